"""Writing files so that a reader sees the old one or the whole new one, never half of it; the cache."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and vanishes otherwise.

    Raises:
        OSError: the file cannot be written; names `path`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder) / "note.txt") as temporary:
        ...         _ = temporary.write_text("whole or not at all")
        ...     (Path(folder) / "note.txt").read_text()
        'whole or not at all'
    """
    path = Path(path)
    # In the same folder, because a rename is atomic only within a file system; with the same ending, because
    # writers such as matplotlib choose the format by it. A long name is cut, or it would be too long here.
    temporary = path.with_name(f".{path.stem[:32]}-{secrets.token_hex(8)}{path.suffix}")
    try:
        _create(temporary)
        yield temporary
        # The bytes must be on the disk before the name points at them, or a power cut leaves an empty file.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A full disk is found out without a name, and nobody knows the temporary one.
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        # A folder that does not exist holds no temporary file either, and a file in its place is no folder.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


def _create(path: Path) -> None:
    """Make an empty file that nobody else has, for everyone the umask lets in.

    The system applies the umask here. tempfile's files are private, and to open them up later takes the
    umask, which a process can only read by setting it: other threads would create files without one.
    """
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a text file in one piece, see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def cache_folder() -> Path:
    """The user's folder for what OVQ can make again; it need not exist yet.

    Raises:
        OSError: the user has no home folder.

    Example:
        >>> cache_folder().name
        'ovq'
    """
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(base or Path.home() / ".cache") / "ovq"
    except RuntimeError as error:
        raise OSError(f"no folder for caches: expected XDG_CACHE_HOME or a home folder ({error})") from error
