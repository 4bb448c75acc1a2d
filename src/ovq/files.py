"""Writing files so that a reader sees the old one or the whole new one, never half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes otherwise.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder) / "note.txt") as temporary:
        ...         _ = temporary.write_text("whole or not at all")
        ...     (Path(folder) / "note.txt").read_text()
        'whole or not at all'
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within a file system; with the same ending, because
    # writers such as matplotlib choose the format by it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # The bytes must be on the disk before the name points at them, or a power cut leaves an empty file.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; these are for everyone the umask lets in.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a text file in one piece, see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)
