"""Compiles the kernels for this machine on first use, keeps them in the user's cache and loads them.

If anything goes wrong here, only speed is lost: the op then runs without kernels, and warns once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

from ovq.runtime.files import atomic_path, cache_folder

_logger = logging.getLogger(__name__)

_SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
_MAIN = Path(__file__).parent / "kernels.cpp"
# Arithmetic follows IEEE 754; only errno, traps and C++ exceptions are given up.
_FLAGS = (
    "-O3 -march=native -std=c++17 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti"
)
_SWITCH = "OVQ_CPU_KERNELS"
_TIMEOUT = 300
# An upper bound on the bytes that the compiler writes while it works.
_ROOM = 2**22


class Unavailable(Exception):
    """There are no kernels on this machine; the message says why."""


class SwitchedOff(Unavailable):
    """There are no kernels because the user has switched them off."""


class MissingKernelsWarning(UserWarning):
    """The op runs without compiled kernels although nobody switched them off."""


def load() -> ctypes.CDLL:
    """The compiled kernels. The first call finds or builds them; all others get the same result.

    Raises:
        Unavailable: if they are switched off or cannot be built; the message says why.
    """
    # Threads that call this at the same time wait for one compiler instead of each starting one.
    with _lock:
        outcome = _attempt()
    if isinstance(outcome, Unavailable):
        raise type(outcome)(*outcome.args)
    return outcome


def warn_once(error: Unavailable) -> None:
    """Warn once per process that there are no kernels, and what that costs."""
    global _is_warned
    with _lock:
        is_first, _is_warned = not _is_warned, True
    if is_first:
        warnings.warn(
            f"no compiled CPU kernels ({error}): products of PyTorch do the same at about a third of the "
            f"speed; {_SWITCH}=0 asks for that without this warning",
            MissingKernelsWarning,
            stacklevel=2,
        )


_lock = threading.Lock()
_is_warned = False


@functools.cache
def _attempt() -> ctypes.CDLL | Unavailable:
    """The kernels, or why there are none. The reason is returned, not raised, so that it is cached too.

    Otherwise every call would run the compiler again.
    """
    try:
        return _found_or_built()
    except SwitchedOff as error:
        return SwitchedOff(str(error))
    # Errors of the disk, of a process or of the user database; none of them may make the op fail.
    except (Unavailable, OSError, RuntimeError) as error:
        return Unavailable(str(error))


def _found_or_built() -> ctypes.CDLL:
    """The kernels from the first place that can keep them, built if no place has them."""
    if os.environ.get(_SWITCH, "1") == "0":
        raise SwitchedOff(f"switched off by {_SWITCH}=0")
    compiler = _compiler()
    stem = f"kernels-{_fingerprint(compiler)}"
    binary, reasons = None, []
    for find in (cache_folder, _private_folder):
        try:
            folder = find()
            path = _kept(folder, stem)
            if path is None:
                binary = binary or _compiled(compiler, folder)
                path = _put(binary, folder, stem)
            else:
                # If code on this disk may not be executed, the next place gets a copy.
                binary = path.read_bytes()
            return ctypes.CDLL(str(path))
        except OSError as error:
            reasons.append(str(error))
    raise Unavailable("; ".join(reasons))


def _compiler() -> list[str]:
    """The command of the C++ compiler: the environment's CXX, or the first compiler found."""
    if text := os.environ.get("CXX", "").strip():
        try:
            return shlex.split(text)
        except ValueError as error:
            raise Unavailable(f"CXX: expected a command, found {text!r} ({error})") from error
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise Unavailable("no C++ compiler found (c++, g++ or clang++)")


def _fingerprint(compiler: list[str]) -> str:
    """All that the compiled code depends on: sources, flags, compiler, system and processor."""
    parts = [_FLAGS, shlex.join(compiler), *platform.libc_ver(), platform.machine(), _processor()]
    total = hashlib.sha256("\0".join(parts).encode(errors="replace"))
    for path in _SOURCES:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def _processor() -> str:
    """The processor and its features, if the system reports them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _private_folder() -> Path:
    """This user's folder in the directory of temporary files, for kernels that the cache cannot keep.

    Its name is always the same, so that processes share what the first of them compiled, and do not each
    leave a folder behind. Another user could have made a folder of that name to have their code run, so the
    folder is used only if it is private.
    """
    if not hasattr(os, "geteuid"):
        raise OSError("no folder for temporary files of one user on this system")
    folder = Path(tempfile.gettempdir()) / f"ovq-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & 0o077:
        raise OSError(f"{folder}: expected a folder that belongs to this user alone, found another")
    return folder


def _kept(folder: Path, stem: str) -> Path | None:
    """The kernels' file in a folder, or None if it is missing or incomplete.

    Its name ends with the digest of its bytes. Without this check the loader would map a truncated file
    without complaint, and the process would die of a bus error on reading the missing part.
    """
    for path in sorted(folder.glob(f"{stem}-*.so")):
        # A file that cannot be read, or was deleted in the meantime, counts as missing.
        with contextlib.suppress(OSError):
            if path.name == _file_name(stem, path.read_bytes()):
                return path
    return None


def _file_name(stem: str, binary: bytes) -> str:
    return f"{stem}-{hashlib.sha256(binary).hexdigest()[:32]}.so"


def _put(binary: bytes, folder: Path, stem: str) -> Path:
    """Write the kernels to a folder atomically: other processes may do the same at the same time."""
    path = folder / _file_name(stem, binary)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(binary)
    return path


def _compiled(compiler: list[str], folder: Path) -> bytes:
    """Compile the kernels.

    Args:
        compiler: the command.
        folder: where they are kept. They are compiled there too, so that a full disk for temporary files does
            not matter, and a folder that cannot keep them is noticed before time is spent.

    Raises:
        OSError: if the folder cannot be written.
        Unavailable: if the compiler fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as place:
        _check_room(Path(place), folder)
        _logger.info("compiling the CPU kernels to %s", folder)
        compiled, linked = Path(place) / "kernels.o", Path(place) / "kernels.so"
        _run([*compiler, *_FLAGS.split(), "-c", str(_MAIN), "-o", str(compiled)], place)
        # Not linked with an OpenMP library of their own: the kernels share the threads of the library that
        # torch has loaded, because two sets of threads would wait for each other.
        _run([*compiler, "-shared", str(compiled), "-o", str(linked)], place)
        return linked.read_bytes()


def _check_room(place: Path, folder: Path) -> None:
    """Raise OSError, naming the folder, if there is too little room for what the compiler writes."""
    try:
        with open(place / "room", "wb") as file:
            file.write(bytes(_ROOM))
            # Some file systems report only here that they are full.
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    (place / "room").unlink()


def _run(command: list[str], place: str) -> None:
    """Run a command that keeps its temporary files in a given folder."""
    environment = {**os.environ, "TMPDIR": place}
    try:
        result = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from error
    if result.returncode:
        # The output may be in any encoding, and the error need not come first.
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        lines = [line for line in lines if "error" in line] or lines or [f"exit status {result.returncode}"]
        raise Unavailable(f"{command[0]} failed: {lines[0]}")
