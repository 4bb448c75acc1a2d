"""Finds the kernels: those of the package, those compiled before, or a compiler to make them.

A wheel for this system brings kernels compiled in advance for several levels of processors (`compiler.py`),
of which the fastest that this processor can run is taken. Without them, the kernels are compiled for exactly
this processor on first use and kept in the user's cache.

If anything goes wrong here, only speed is lost: the op then runs without kernels, and warns once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout

from ovq.ops.backends.cpu import compiler
from ovq.ops.backends.cpu.compiler import Level, Unavailable
from ovq.ops.backends.cpu.mirrors import check_mirrors
from ovq.runtime.files import TemporaryFolder, atomic_path, cache_folder, check_owner, private_folder

_logger = logging.getLogger(__name__)

# Where a wheel carries what was compiled in advance. No such folder is in the repository.
_PREBUILT = compiler.FOLDER / "prebuilt"
_SWITCH = "OVQ_CPU_KERNELS"
# Arguments of `ovq_use_threads` of workers.h, in its order.
_OPENMP = ("GOMP_parallel", "omp_get_num_threads", "omp_get_thread_num", "GOMP_barrier")
# Kernels that allocate scratch, and return another number than 0 if out of memory.
_WITH_SCRATCH = ("ovq_forward", "ovq_backward", "ovq_window_forward", "ovq_window_backward", "ovq_memory")
# An upper bound on the bytes that the compiler writes while it works.
_BUILD_BYTES = 2**22


class SwitchedOff(Unavailable):
    """There are no kernels because the user has switched them off."""


class MissingKernelsWarning(UserWarning):
    """The op runs without compiled kernels although nobody switched them off."""


class Kernels(NamedTuple):
    """Loaded kernels, and a description of where they are from."""

    library: ctypes.CDLL
    origin: str


def load() -> ctypes.CDLL:
    """The compiled kernels. The first call finds or builds them; all others get the same result.

    Raises:
        Unavailable: if they are switched off or cannot be built; the message says why.
    """
    return _outcome().library


def origin() -> str:
    """Where the kernels of `load` are from: compiled for this processor, or in advance for a level.

    Raises:
        Unavailable: as `load`.
    """
    return _outcome().origin


def warn_once(error: Unavailable) -> None:
    """Warn once per process that there are no kernels, and what that costs."""
    global _is_warned
    with _lock:
        is_first, _is_warned = not _is_warned, True
    if is_first:
        warnings.warn(
            f"no compiled CPU kernels ({error}): PyTorch's own products do the same at about a third of "
            f"the speed; {_SWITCH}=0 selects them without this warning",
            MissingKernelsWarning,
            stacklevel=2,
        )


_lock = threading.Lock()
_is_warned = False


def _renew_lock() -> None:
    """Free the lock in a forked process: the thread that holds it is not in it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def _outcome() -> Kernels:
    # Threads that call this at the same time wait for one compiler instead of each starting one.
    with _lock:
        outcome = _attempt()
    if isinstance(outcome, Unavailable):
        raise type(outcome)(*outcome.args)
    return outcome


@functools.cache
def _attempt() -> Kernels | Unavailable:
    """The kernels, or why there are none. The reason is returned, not raised, so that it is cached too.

    Otherwise every call would run the compiler again.
    """
    try:
        return _requested_kernels()
    except SwitchedOff as error:
        return SwitchedOff(str(error))
    # Errors of the disk, of a process or of the user database; none of them may make the op fail.
    except (Unavailable, OSError, RuntimeError) as error:
        return Unavailable(str(error))


def _requested_kernels() -> Kernels:
    """The kernels that the environment asks for: any, those for exactly this CPU, or those of a level."""
    choice = os.environ.get(_SWITCH, "").strip() or "1"
    if choice == "0":
        raise SwitchedOff(f"switched off by {_SWITCH}=0")
    if choice == "native":
        return _found_or_built(compiler.NATIVE, "compiled for this processor")
    levels = compiler.processor_levels()
    if choice != "1":
        level = next((level for level in levels if level.name == choice), None)
        if level is None:
            names = ", ".join(["0", "1", "native", *(level.name for level in levels)])
            raise Unavailable(f"{_SWITCH}: expected one of {names} on this processor, found {choice!r}")
        return _prebuilt([level]) or _found_or_built(level.flags, f"compiled for {level.name}")
    if (kernels := _prebuilt(levels)) is not None:
        return kernels
    try:
        return _found_or_built(compiler.NATIVE, "compiled for this processor")
    except (Unavailable, OSError, RuntimeError) as error:
        raise Unavailable(
            f"none for this processor in the installed package, and none made here: {error}"
        ) from error


def _prebuilt(levels: list[Level]) -> Kernels | None:
    """The first of the levels for which the package brings kernels that can be loaded, or None."""
    for level in levels:
        path = _PREBUILT / compiler.prebuilt_name(level)
        # Most installations have none. If they cannot be executed, those in the user's cache may.
        if path.is_file():
            try:
                return _loaded(path, f"compiled in advance for {level.name}")
            except OSError as error:
                _logger.info("kernels of the package cannot be loaded: %s", error)
    return None


def _loaded(path: Path, how: str) -> Kernels:
    """The kernels of a file, with the threads of the OpenMP library that torch has loaded.

    Its functions are looked up in torch's own module, not among all loaded libraries: torch's wheels for
    arm64 hide the library from others, and another package may have loaded another one.

    Raises:
        OSError: if the file cannot be loaded, or has no kernels.
        Unavailable: if its structures are not those that Python would call it with.
    """
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "ovq_use_threads"):
        raise OSError(f"{path}: expected a library of kernels, found one without them")
    check_mirrors(library)
    for name in _WITH_SCRATCH:
        getattr(library, name).errcheck = _check_scratch
    try:
        of_torch = ctypes.CDLL(torch._C.__file__)
        functions = [ctypes.cast(getattr(of_torch, name), ctypes.c_void_p) for name in _OPENMP]
    except (OSError, AttributeError) as error:
        _logger.info("no OpenMP library of torch: %s", error)
        return Kernels(library, f"{how}, for one thread (torch has loaded no OpenMP library)")
    library.ovq_use_threads(*functions)
    return Kernels(library, how)


def _check_scratch(outcome: int, function: Any, arguments: tuple) -> None:
    """Raise MemoryError where a kernel found no memory: ctypes calls this after each."""
    if outcome:
        raise MemoryError(f"{function.__name__}: no memory for the kernel's scratch")


def _found_or_built(flags: tuple[str, ...], how: str) -> Kernels:
    """The kernels from the first place that can keep them, built if no place has them."""
    command, binary, reasons = None, None, []
    try:
        command = compiler.find_compiler()
    except Unavailable as error:
        # Those of another compiler may be here, as in a container whose build had one.
        reasons.append(str(error))
    stem = f"kernels-{compiler.fingerprint(command, flags)}"
    for find in (cache_folder, private_folder):
        try:
            folder = find()
            # Others must not write code here, whatever the umask.
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            check_owner(folder)
            if command is None:
                if (kernels := _first_loaded(folder, stem, how)) is None:
                    continue
                return kernels
            path = next(_cached_files(folder, stem), None)
            if path is None:
                with _one_process_first(folder, stem):
                    # Another process may have made them meanwhile.
                    path = next(_cached_files(folder, stem), None)
                    if path is None:
                        path = _store(binary or _compiled(command, flags, folder), folder, stem)
            # If code on this disk may not be executed, the next place gets a copy.
            binary = path.read_bytes()
            return _loaded(path, how)
        except OSError as error:
            reasons.append(str(error))
    raise Unavailable("; ".join(reasons))


def _first_loaded(folder: Path, stem: str, how: str) -> Kernels | None:
    """The first kernels of any compiler that can be loaded."""
    for path in _cached_files(folder, stem):
        with contextlib.suppress(OSError):
            return _loaded(path, how)
    return None


@contextlib.contextmanager
def _one_process_first(folder: Path, stem: str) -> Iterator[None]:
    """Wait for a process that is in this block for the same kernels; all that have waited go on at once.

    Otherwise the processes of a first start on many cores would each take the memory and the time of a
    compiler. If the first one makes no kernels, the others do not take turns to fail.
    """
    path = folder / f".{stem}.lock"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        # Compiling and linking may each take `TIMEOUT`.
        with contextlib.suppress(OSError), lock.acquire(timeout=2 * compiler.TIMEOUT):
            pass
    except (OSError, NotImplementedError) as error:
        _logger.info("cannot wait for other processes: %s", error)
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            path.unlink()


def _cached_files(folder: Path, stem: str) -> Iterator[Path]:
    """The complete files of kernels whose names begin with `stem`.

    A name ends with the digest of its bytes. Without this check the loader would map a truncated file
    without complaint, and the process would die of a bus error on reading the missing part.
    """
    for path in sorted(folder.glob(f"{stem}-*.so")):
        # A file of others, or that cannot be read, or was deleted in the meantime, counts as missing.
        with contextlib.suppress(OSError):
            check_owner(path)
            if path.name == _file_name(path.name.rpartition("-")[0], path.read_bytes()):
                yield path


def _file_name(stem: str, binary: bytes) -> str:
    return f"{stem}-{hashlib.sha256(binary).hexdigest()[:32]}.so"


def _store(binary: bytes, folder: Path, stem: str) -> Path:
    """Write the kernels to a folder atomically: other processes may do the same at the same time."""
    path = folder / _file_name(stem, binary)
    if path.is_symlink():
        # Else the kernels would be written to where it points, and the link of others would stay.
        path.unlink()
    with atomic_path(path) as temporary:
        temporary.write_bytes(binary)
    path.chmod(0o644)
    return path


def _compiled(command: list[str], flags: tuple[str, ...], folder: Path) -> bytes:
    """Compile the kernels in the folder that will keep them.

    So a full disk for temporary files does not matter, and a folder that cannot keep them is noticed before
    time is spent.

    Raises:
        OSError: if the folder cannot be written.
        Unavailable: if the compiler fails.
    """
    with TemporaryFolder("build", folder) as place:
        _check_disk_space(Path(place), folder)
        _logger.info("compiling the CPU kernels to %s", folder)
        return compiler.compile_kernels(command, flags, Path(place))


def _check_disk_space(place: Path, folder: Path) -> None:
    """Raise OSError, naming the folder, if there is too little room for what the compiler writes."""
    try:
        with open(place / "space", "wb") as file:
            file.write(bytes(_BUILD_BYTES))
            # Some file systems report only here that they are full.
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
    (place / "space").unlink()
