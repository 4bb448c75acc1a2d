"""How the kernels are compiled: commands, and the levels of processors to compile for in advance.

This file needs nothing but the standard library and imports nothing of ovq, because the build of a wheel
(`hatch_build.py`) reads it where neither ovq nor torch is installed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
if not FOLDER.is_dir():
    raise ImportError(f"expected an unpacked package, found a zip file: {FOLDER}")
SOURCES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".cpp", ".h"))
# The structures that Python passes to kernels (`mirrors.py`), after those that they contain.
MIRRORED = (
    *("Convolution", "Decode", "Heads", "Matrix", "Strided", "Strides", "Tokens"),
    *("Call", "HeadGroup", "Layer", "Window"),
)
# Arithmetic follows IEEE 754; only errno, traps and C++ exceptions are given up. Some vectors are wider than
# the registers of some processors. Only inline functions pass them, so the warnings about that do not apply.
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"),
    "-Wno-psabi",
)
_ARM64 = ("arm64", "aarch64")
# For the processor that the compiler runs on. For arm64, not all compilers accept "native" as the name of an
# architecture, but all accept it as that of a processor.
NATIVE = ("-mcpu=native",) if platform.machine() in _ARM64 else ("-march=native",)
# Seconds that a compiler may take.
TIMEOUT = 300


class Unavailable(Exception):
    """There are no kernels on this machine; the message says why."""


class Level(NamedTuple):
    """A kind of processors that one compiled file serves."""

    name: str
    machines: tuple[str, ...]
    """Names of `platform.machine()`."""
    features: frozenset[str]
    """CPU flags that it needs, by their names in Linux's /proc/cpuinfo."""
    flags: tuple[str, ...]
    """For the compiler."""


_X86 = ("x86_64",)
_AVX2 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
# Processors that have the first have the second as well.
_BF16 = _AVX512 | {"avx512_bf16", "avx512_vnni"}
# The fastest first.
LEVELS = (
    Level(
        "amx",
        _X86,
        _BF16 | {"amx_tile", "amx_bf16"},
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16"),
    ),
    Level("avx512bf16", _X86, _BF16, ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")),
    Level("avx512", _X86, _AVX512, ("-march=x86-64-v4",)),
    Level("avx2", _X86, _AVX2, ("-march=x86-64-v3",)),
    # All of them have the same vectors, which compilers use by default.
    Level("arm64", _ARM64, frozenset(), ()),
)


def machine_levels() -> list[Level]:
    """The levels of this machine's family of processors, the fastest first; it may be unable to run some."""
    is_known = sys.platform in ("linux", "darwin")
    return [level for level in LEVELS if is_known and platform.machine() in level.machines]


def processor_levels() -> list[Level]:
    """The levels whose code this processor can run, the fastest first."""
    features = processor_features()
    return [level for level in machine_levels() if level.features <= features]


def processor_features() -> frozenset[str]:
    """CPU flags of this processor, as Linux names them; empty where the system does not say."""
    for line in cpu_lines("flags"):
        return frozenset(line.partition(":")[2].split())
    return frozenset()


def cpu_lines(*wanted: str) -> list[str]:
    """Those lines of /proc/cpuinfo that begin with a wanted word, each once; none without such a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return list(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def prebuilt_name(level: Level) -> str:
    """The name of the file that is compiled in advance for a level.

    It names the sources as well, because kernels of other sources expect other arguments.
    """
    return f"kernels_{level.name}_{digest(*_FLAGS, *level.flags)}.so"


def digest(*parts: str) -> str:
    """Hash of the sources and of further texts, 16 hex digits."""
    total = hashlib.sha256("\0".join((*parts, _main())).encode(errors="replace"))
    for path in SOURCES:
        total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()[:16]


def fingerprint(compiler: list[str] | None, flags: tuple[str, ...]) -> str:
    """Digests of sources, flags, system and processor, and of the compiler (`*` for any, as None).

    The compiled code depends on nothing else.
    """
    processor = "\n".join(cpu_lines("model name", "flags", "Features", "CPU part")) or platform.processor()
    system = (*platform.libc_ver(), platform.machine(), processor)
    own = "*" if compiler is None else digest(shlex.join(compiler))
    return f"{digest(*_FLAGS, *flags, *system)}-{own}"


def find_compiler() -> list[str]:
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


def compile_kernels(compiler: list[str], flags: tuple[str, ...], place: Path) -> bytes:
    """Compile the kernels.

    Args:
        compiler: the command.
        flags: what to compile for: `NATIVE`, or the flags of a level.
        place: an empty folder for what the compiler writes.

    Raises:
        Unavailable: if the compiler fails, or makes nothing.
    """
    main, compiled, linked = (place / name for name in ("main.cpp", "kernels.o", "kernels.so"))
    main.write_text(_main(), encoding="utf-8")
    _run([*compiler, *_FLAGS, *flags, "-I", str(FOLDER), "-c", str(main), "-o", str(compiled)], place)
    _run([*compiler, "-shared", str(compiled), "-o", str(linked)], place)
    try:
        return linked.read_bytes()
    except FileNotFoundError:
        raise Unavailable(f"{shlex.join(compiler)} reported success, but wrote no library") from None


def fields_of(structure: str) -> list[tuple[str, str, int]]:
    """The fields of a structure of the kernels, in order, read from the headers.

    Returns:
        Name, type (`"*"` for all pointers) and length (0 if it is no array) of each field.
    """
    fields = []
    body = _structures()[structure]
    for kind, names in re.findall(r"^\s*(?:const )?(\w+) ([^;]+);", body, flags=re.MULTILINE):
        for pointer, name, length in re.findall(r"(\*?)(\w+)(?:\[(\d+)\])?", names):
            fields.append((name, pointer or kind, int(length or 0)))
    return fields


@functools.cache
def _structures() -> dict[str, str]:
    """The body of each structure of the sources, without comments."""
    sources = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    text = re.sub(r"/\*.*?\*/", "", sources, flags=re.DOTALL)
    return dict(re.findall(r"^struct (\w+) {(.*?)^};", text, flags=re.DOTALL | re.MULTILINE))


def _main() -> str:
    """The file to compile: the kernels, and a table of where the fields of their structures are."""
    places = []
    for name in MIRRORED:
        places += [f'{{"{name}", 0, sizeof({name})}}']
        for x, *_ in fields_of(name):
            places += [f'{{"{name}.{x}", offsetof({name}, {x}), sizeof({name}::{x})}}']
    return (
        '#include "kernels.cpp"\n#include <cstddef>\n'
        "struct Place { const char *name; int64_t at, size; };\n"
        'extern "C" const Place *ovq_places() {\n    static const Place places[] = {\n        '
        + ",\n        ".join([*places, "{nullptr, 0, 0}"])
        + "};\n    return places;\n}\n"
    )


def _run(command: list[str], place: Path) -> None:
    """Run a command that keeps its temporary files in a given folder.

    On a timeout, and on Ctrl-C, its child processes are killed as well: the compiler behind a driver would go
    on, and write to a folder that is being removed.
    """
    environment = {**os.environ, "TMPDIR": str(place)}
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=nothing, stdout=nothing, stderr=pipe, env=environment, start_new_session=True
        )
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from error
    with process:
        try:
            _, errors = process.communicate(timeout=TIMEOUT)
        except BaseException as error:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise Unavailable(f"{command[0]} did not finish within {TIMEOUT} s") from None
            raise
    if process.returncode:
        # The output may be in any encoding, and the error need not come first.
        lines = errors.decode(errors="replace").strip().splitlines()
        lines = [line for line in lines if "error" in line] or lines or [f"exit status {process.returncode}"]
        raise Unavailable(f"{command[0]} failed: {lines[0]}")
