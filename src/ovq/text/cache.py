"""Folders in the user's cache: one process fills a folder while others wait; it appears only when
complete."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ovq.runtime.files import cache_folder

_FORMAT = "2"


def cached_folder(depends_on: Iterable[str], fill: Callable[[Path], None]) -> Path:
    """The cached folder whose content depends only on these texts; filled first if there is none.

    Args:
        depends_on: What the content is made from, in order.
        fill: Called with an empty folder if there is none yet; if it raises, no folder is left.

    Raises:
        OSError: If the cache cannot be written.

    Example:
        >>> folder = cached_folder(["an example"], lambda path: (path / "a").write_text("made once"))
        >>> (cached_folder(["an example"], lambda path: 1 / 0) / "a").read_text()
        'made once'
    """
    # transformers and torch lock their caches with this package too.
    from filelock import FileLock

    digest = hashlib.sha256("\0".join([_FORMAT, *depends_on]).encode()).hexdigest()[:24]
    base = cache_folder() / "text"
    base.mkdir(parents=True, exist_ok=True)
    folder = base / digest
    if folder.is_dir():
        return folder
    with FileLock(folder.with_suffix(".lock")):
        # Another process may have made it meanwhile.
        if not folder.is_dir():
            _make(folder, fill)
    return folder


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    temporary = folder.with_name(f".unfinished-{folder.name}")
    # Only the holder of the lock gets here, so a folder that is there was left by a process that was killed.
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
