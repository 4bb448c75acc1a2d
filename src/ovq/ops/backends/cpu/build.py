"""Compiles the kernels for this machine on first use, keeps them in the user's cache and loads them."""

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
import subprocess
import tempfile
from pathlib import Path

_logger = logging.getLogger(__name__)

_SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))
_MAIN = Path(__file__).parent / "kernels.cpp"
# Arithmetic stays that of IEEE: what is left out is the bookkeeping of errors and exceptions alone.
_FLAGS = (
    "-O3 -march=native -std=c++17 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti"
)
_SWITCH = "OVQ_CPU_KERNELS"
_TIMEOUT = 300


class Unavailable(Exception):
    """Why there are no kernels on this machine."""


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        Unavailable: if they are switched off or cannot be had; says why.
    """
    if os.environ.get(_SWITCH, "1") == "0":
        raise Unavailable(f"switched off by {_SWITCH}=0")
    compiler = _compiler()
    name = f"kernels-{_fingerprint(compiler)}.so"
    path = _cache_folder() / name
    if path.is_file():
        # A file that cannot be loaded, such as one that a full disk cut short, is made anew.
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    _logger.info("compiling the CPU kernels to %s", path)
    _compile(compiler, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"{path} cannot be loaded: {error}") from error


def _compiler() -> list[str]:
    """The C++ compiler: that of the environment, or the first there is."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return [path]
    raise Unavailable("no C++ compiler found (c++, g++ or clang++)")


def _fingerprint(compiler: list[str]) -> str:
    """What the compiled code depends on: sources, flags, compiler and processor."""
    parts = [_FLAGS, shlex.join(compiler), platform.machine(), _processor()]
    parts += [path.name + path.read_text() for path in _SOURCES]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The processor and what it can do, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _cache_folder() -> Path:
    """Where compiled kernels are kept; a folder of this process alone if the user's cannot be written."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "ovq"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _own_folder()


@functools.cache
def _own_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="ovq-"))


def _compile(compiler: list[str], path: Path) -> None:
    """Compile and put the result in place in one step, whoever else does the same meanwhile."""
    with tempfile.TemporaryDirectory(prefix="ovq-build-") as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        _run([*compiler, *_FLAGS.split(), "-c", str(_MAIN), "-o", str(compiled)])
        # Not linked with an OpenMP library of their own: they share the threads of the one that torch loaded,
        # as two sets of threads would wait for each other.
        _run([*compiler, "-shared", str(compiled), "-o", str(linked)])
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        os.close(handle)
        shutil.copyfile(linked, partial)
        os.replace(partial, path)


def _run(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from error
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise Unavailable(f"{command[0]} failed: {lines[0]}")
