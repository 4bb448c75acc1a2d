"""Atomic writes of files and folders, locked and temporary folders, JSON, and the cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ovq.runtime.units import memory_refused

try:
    # System locks, which are released however the process ends. Not available on Windows.
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]  # as mypy knows no module that may be missing


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Context manager: a temporary path, renamed to `path` if the block succeeds, removed otherwise.

    A reader sees the old file or the complete new one, never a part. Links stay: what they point to is
    replaced. OSErrors name `path`; a ValueError refuses to replace a device, such as `/dev/null`, or a pipe.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"expected a file or a new path, found a device or a pipe: {path}")
    # Else the superuser would replace `/dev/stdout`, a link, for all programs.
    real = Path(os.path.realpath(path))
    # In the same folder, because a rename is atomic only within a file system; with the same ending, because
    # writers such as matplotlib choose the format by it. A long name is shortened, or it would be too long
    # with the additions.
    temporary = real.with_name(f".{path.stem[:32]}-{secrets.token_hex(8)}{path.suffix}")
    try:
        _create(temporary)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        # Some writers, such as safetensors, replace the file by a private one.
        temporary.chmod(mode)
        # The bytes must be on the disk before the name points at them; otherwise a power cut could leave an
        # empty file.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except OSError as error:
        # The error of a full disk names no file, and the temporary name means nothing to the user.
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        # If the folder does not exist, or a file is in its place, there is no temporary file to remove.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            temporary.unlink()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Context manager: a temporary path for a folder, renamed to `path` on success, else removed.

    Errors of writing are those of `writing`.
    """
    # In the same parent folder, so that the rename is atomic.
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with writing(path):
            yield temporary
            open_to_others(temporary)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn any error of a failed write of a model or checkpoint into an OSError that names the path.

    safetensors, PyTorch and tokenizers raise their own error types when a disk is full. Those of PyTorch when
    it is out of memory stay as they are.

    Example:
        >>> with writing(Path("run")):
        ...     raise RuntimeError("PytorchStreamWriter failed writing file")
        Traceback (most recent call last):
        OSError: run: cannot be written (PytorchStreamWriter failed writing file)
    """
    try:
        yield
    except Exception as error:
        if memory_refused(error) is not None:
            raise
        # Those of tokenizers have no class of their own.
        if not isinstance(error, (OSError, RuntimeError, SafetensorError)) and type(error) is not Exception:
            raise
        raise OSError(f"{path}: cannot be written ({error})") from error


def _create(path: Path) -> None:
    """Create an empty file with a new name, with the permissions that the umask gives.

    The system applies the umask here. Files of tempfile are private; making them public afterwards would need
    the umask, which a process can only read by setting it, and other threads would meanwhile create files
    without it.
    """
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))


def write_atomic(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 completely or not at all, see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def claimed(folder: Path, *, command: str) -> Iterator[None]:
    """Context manager that locks a folder for a command of this process; it is created if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    try:
        try:
            descriptor = _lock(folder)
        except BlockingIOError:
            raise
        except OSError:
            # Network file systems only lock files that are open for writing.
            descriptor = _lock(folder / ".lock", os.O_RDWR | os.O_CREAT)
    except BlockingIOError:
        raise ValueError(
            f"--out: expected a folder that no other `{command}` is writing to, found {folder}"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


class TemporaryFolder(tempfile.TemporaryDirectory):
    """A temporary folder, among other temporary files or in `place`.

    Making one also removes those of the same kind that killed processes have left there.
    """

    def __init__(self, kind: str, place: Path | None = None) -> None:
        # Hidden in a folder that is not for temporary files, where users may have some of such a name.
        prefix = f"ovq-{kind}-" if place is None else f".ovq-{kind}-"
        _remove_left(Path(tempfile.gettempdir()) if place is None else place, prefix)
        super().__init__(prefix=prefix, dir=place, ignore_cleanup_errors=True)
        with contextlib.suppress(OSError):
            weakref.finalize(self, os.close, _lock(self.name))


# A new folder may not be locked yet.
_SECONDS_TO_LOCK = 60.0


def _remove_left(place: Path, prefix: str) -> None:
    """Remove the folders in `place` with this prefix that no process has locked."""
    for folder in place.glob(f"{prefix}*"):
        # Folders of other users cannot be opened.
        with contextlib.suppress(OSError):
            is_new = time.time() - folder.lstat().st_mtime < _SECONDS_TO_LOCK
            if is_new or folder.is_symlink():
                continue
            descriptor = _lock(folder)
            try:
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _lock(path: str | os.PathLike, flags: int = os.O_RDONLY) -> int:
    """Lock a file or folder; returns its descriptor, closing which unlocks it. OSError if it is locked."""
    if fcntl is None:
        raise OSError("expected a system with locks, found none")
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def open_to_others(folder: Path) -> None:
    """Give the files in a folder the permissions that the umask gives; safetensors writes private ones."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        example = Path(own) / "example"
        _create(example)
        mode = stat.S_IMODE(example.stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # RecursionError for deeply nested content.
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path}: expected JSON, found invalid JSON ({error})") from error


def cache_folder() -> Path:
    """The user's cache folder of OVQ; it need not exist yet. OSError if the user has no home folder.

    Example:
        >>> cache_folder().name
        'ovq'
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # By its specification, relative paths are ignored: each working folder would be another cache.
        return (base if base.is_absolute() else Path.home() / ".cache") / "ovq"
    except RuntimeError as error:
        raise OSError(
            f"no folder for caches: expected an absolute XDG_CACHE_HOME or a home folder ({error})"
        ) from error


def private_folder() -> Path:
    """This user's private folder for temporary files, a fallback where `cache_folder` cannot be used.

    Its name is fixed, so that processes share its content and do not each leave a folder behind. Another user
    could create a folder of that name to have their code run, so it is only used if it is private, else an
    OSError is raised.
    """
    if not hasattr(os, "geteuid"):
        raise OSError("no folder for temporary files of one user on this system")
    folder = Path(tempfile.gettempdir()) / f"ovq-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & 0o077:
        raise OSError(
            f"{folder}: expected a private folder of this user, found one that others own or can access"
        )
    return folder


def check_owner(path: Path) -> None:
    """Raise OSError if another user than root owns a file or folder, or a link to it, or may write to it."""
    if not hasattr(os, "geteuid"):
        return
    status = path.stat()
    # A group with the number of its user has no other members.
    others = 0o002 if status.st_gid == status.st_uid else 0o022
    owners = {status.st_uid, path.lstat().st_uid}
    if not owners <= {0, os.geteuid()} or status.st_mode & others:
        raise OSError(f"{path}: expected one that only this user may write to, found one of others")
