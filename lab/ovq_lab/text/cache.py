"""Cache folders of the user: one process fills a folder while others wait; it appears only when complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ovq.runtime.files import cache_folder, private_folder

_FORMAT = "4"


def cached_folder(depends_on: Iterable[str], fill: Callable[[Path], None]) -> Path:
    """The cached folder for a key of several strings; it is filled first if it does not exist.

    Args:
        fill: Called with an empty folder to fill, if there is none yet; if it raises, no folder is left.

    If the user's cache cannot be written, the folder is in their private one among the temporary files.

    Example:
        >>> folder = cached_folder(["an example"], lambda path: (path / "a").write_text("made once"))
        >>> (cached_folder(["an example"], lambda path: 1 / 0) / "a").read_text()
        'made once'
    """
    # filelock is a dependency of transformers and torch.
    from filelock import FileLock

    digest = hashlib.sha256("\0".join([_FORMAT, *depends_on]).encode()).hexdigest()[:24]
    folder = _place(digest)
    if folder.is_dir():
        return folder
    with FileLock(folder.with_suffix(".lock")):
        # Another process may have made it meanwhile.
        if not folder.is_dir():
            _make(folder, fill)
    return folder


def _place(name: str) -> Path:
    """The path of an existing folder of that name, or else in the first place that can be written."""
    reasons = []
    for find in (cache_folder, private_folder):
        try:
            folder = find() / "text" / name
            if not folder.is_dir():
                folder.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder.parent):
                    pass
            return folder
        except OSError as error:
            reasons.append(str(error))
    raise OSError(
        "expected a writable folder for encoded text (an absolute XDG_CACHE_HOME names one), found none: "
        + "; ".join(reasons)
    )


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f".unfinished-{folder.name}")
    # Only the holder of the lock gets here, so an existing folder was left by a killed process.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        for path in temporary.iterdir():
            # Flushed to disk before the folder gets its name; otherwise a power cut could leave empty files.
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
