"""The compiled kernels against exact attention, in processor time: `python benchmarks/kernel_speed.py`.

`ovq bench` measures wall-clock time, for an idle machine. Here the contenders take turns on one thread, in
processor time, which other jobs disturb less. `OVQ_CPU_KERNELS=avx2` measures the kernels of another
instruction set. `--before FOLDER`, the `src/ovq/ops/backends/cpu` of an earlier commit, adds kernels compiled
from there (not for decoding, where more than kernels changed).
"""

from __future__ import annotations

import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from ovq.ops import cpu_kernels
from ovq.ops.backends.cpu import build, compiler
from ovq_lab.bench.measure import interleaved
from ovq_lab.bench.workloads import Workload

# Measured cases: part, dtype, tokens.
CASES = (
    ("forward", "float32", 16384),
    ("forward", "bfloat16", 16384),
    ("forward_backward", "float32", 8192),
    ("forward_backward", "bfloat16", 8192),
    *(("decode", "float32", length) for length in (512, 1024, 4096, 65536)),
)
SLOTS = 1024


def compiled(folder: Path) -> ctypes.CDLL:
    """Compile a folder's kernels for the instruction set in `OVQ_CPU_KERNELS` (default: native)."""
    wish = os.environ.get("OVQ_CPU_KERNELS", "")
    flags = next((level.flags for level in compiler.LEVELS if level.name == wish), compiler.NATIVE)
    with tempfile.TemporaryDirectory() as temporary:
        path = f"{temporary}/before.so"
        options = [*compiler._FLAGS, *flags, "-shared", str(folder / "kernels.cpp"), "-o", path]
        subprocess.run([*compiler.find_compiler(), *options], check=True)
        return ctypes.CDLL(path)


def main(before: Annotated[Path | None, typer.Option()] = None, rounds: int = 3, only: str = "") -> None:
    """Print how many times as fast as exact attention OVQ is; `only` is a part of a case's name."""
    torch.set_num_threads(1)
    kernels = {"now": build.load()} if before is None else {"before": compiled(before), "now": build.load()}
    print(f"{cpu_kernels()}; 8 heads of 64, {SLOTS} slots, chunks of 256, one thread")
    for part, dtype, length in CASES:
        name, is_decode = f"{part} {dtype} {length}", part == "decode"
        if only not in name:
            continue
        exact = Workload(mixer="sdpa", length=length, dtype=dtype)
        ovq = Workload(mixer="ovq", length=length, dtype=dtype, num_slots=SLOTS)
        own = getattr(ovq, part)("cpu")

        def with_kernels(library: ctypes.CDLL, call: Callable[[], object] = own) -> Callable[[], object]:
            def run() -> object:
                build.load = lambda: library
                return call()

            return run

        libraries = {"now": kernels["now"]} if is_decode else kernels
        functions = [getattr(exact, part)("cpu"), *map(with_kernels, libraries.values())]
        all_times = interleaved(
            functions, max_rounds=rounds, run=64 if is_decode else 1, seconds=1e9, clock=time.process_time
        )
        reference, *times = map(statistics.median, all_times)
        found = (
            f"{of} {t * 1e3:.3f} ms, {reference / t:.2f} times"
            for of, t in zip(libraries, times, strict=True)
        )
        print(f"{name}: exact attention {reference * 1e3:.3f} ms; " + "; ".join(found), flush=True)


if __name__ == "__main__":
    typer.run(main)
