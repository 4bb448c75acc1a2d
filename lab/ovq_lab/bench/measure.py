"""Measurements of `ovq bench`: medians over interleaved rounds for time, fresh processes for memory.

Machines are noisy, so numbers are compared only within one run, in which the compared functions take turns.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ovq.ops import cpu_kernels
from ovq.ops.backends.cpu.roof import product_loop
from ovq.runtime.progress import WorkReporter
from ovq_lab.bench import peak
from ovq_lab.bench.workloads import Workload
from ovq_lab.runtime.environment import environment

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Piece = tuple[str, Callable[[], list[dict]]]
"""Name of a piece of work in the progress, and the function that does it and returns rows of the report."""


def do_pieces(pieces: Sequence[Piece], reporter: WorkReporter) -> list[dict]:
    """Do all pieces of work one after the other; returns their rows."""
    work = reporter.start("measuring", total=len(pieces))
    rows: list[dict] = []
    for done, (note, piece) in enumerate(pieces):
        work.update(done, note=note)
        rows += piece()
    work.update(len(pieces), note="done")
    return rows


def as_report(
    rows: Sequence[dict],
    *,
    suite: dict[str, Any],
    matrix_rate: dict[str, float],
    device: str = "cpu",
    backends: dict[str, str | None] | None = None,
    **others: Any,
) -> dict[str, Any]:
    """A report as JSON types: environment, suite and rows."""
    return {
        "environment": environment(device) | {"backends": backends or {}, "cpu_kernels": cpu_kernels()},
        "suite": suite,
        "matrix_rate": matrix_rate,
        "rows": rows,
        "crossover": [],
    } | others


def interleaved(
    functions: Sequence[Callable[[], object]],
    *,
    device: str = "cpu",
    max_rounds: int = 9,
    seconds: float = 4.0,
    run: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of each call of each function; the functions take turns.

    Each function is first called once to warm up. Then rounds follow until the slowest function has taken
    `seconds` or there were `max_rounds` of them, but at least three (one, for functions that take over ten
    seconds). A turn is `run` calls: for calls so short that caches matter, the other functions must not evict
    their data in between.

    Example:
        >>> times = interleaved([lambda: sum(range(10)), lambda: sum(range(1000))], max_rounds=5)
        >>> [len(t) for t in times]
        [5, 5]
    """
    slowest = max(_seconds(f, device, clock) for f in functions)
    rounds = 1 if slowest > 10 else min(max_rounds, max(3, int(seconds / max(slowest, 1e-9))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for own_times, function in zip(times, functions, strict=True):
            own_times += [_seconds(function, device, clock) for _ in range(run)]
    return times


def _seconds(function: Callable[[], object], device: str, clock: Callable[[], float]) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def matrix_rate(dtype: str, *, device: str = "cpu", num_heads: int = 8) -> float:
    """FLOP/s of the matrix products in attention, which the roofline share is relative to.

    It is the highest rate of a score product (`num_heads` times 256 x 64 x 1024), a read product
    (256 x 1024 x 64) and one large square product, larger on a GPU, in PyTorch; and, on a CPU, of the inner
    loop of this project's kernels, which compute in float32 if the processor has no faster products.
    """
    rates = []
    if device == "cpu" and (loop := product_loop()) is not None:
        function, flops = loop
        rates.append(flops / min(interleaved([function], max_rounds=15, seconds=1.0)[0]))
    side = 2048 if device == "cpu" else 8192
    for batch, m, k, n in ((num_heads, 256, 64, 1024), (num_heads, 256, 1024, 64), (1, side, side, side)):
        a, b = (
            torch.randn(batch, *size, device=device).to(getattr(torch, dtype)) for size in ((m, k), (k, n))
        )
        out = torch.empty(batch, m, n, dtype=a.dtype, device=device)
        repeats = max(1, int(2e9 / (2 * batch * m * k * n)))

        def call(a: Tensor = a, b: Tensor = b, out: Tensor = out, repeats: int = repeats) -> None:
            for _ in range(repeats):
                torch.bmm(a, b, out=out)

        seconds = min(interleaved([call], device=device, max_rounds=15, seconds=1.0)[0])
        rates.append(2 * batch * m * k * n * repeats / seconds)
    return max(rates)


def peak_bytes(what: str, workload: DataclassInstance, **options: int) -> dict[str, int]:
    """Bytes by which a fresh process grew for a call of `ovq_lab.bench.peak`."""
    call = {"what": what, "workload": dataclasses.asdict(workload), **options}
    done = subprocess.run(
        # As a file, because -m would import what lies in the working directory first.
        [sys.executable, peak.__file__, json.dumps(call)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        raise ValueError(
            f"memory of {call}: expected a process that ends with code 0, found {done.returncode} ({last})"
        )
    return json.loads(done.stdout)


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest time.

    Example:
        >>> spread([3.0, 1.0, 2.0])
        {'seconds': 2.0, 'seconds_min': 1.0, 'seconds_max': 3.0}
    """
    return {
        "seconds": statistics.median(times),
        "seconds_min": min(times),
        "seconds_max": max(times),
    }


def timed_rows(
    part: str,
    workloads: Sequence[Workload],
    all_times: Sequence[Sequence[float]],
    matrix_rate: float,
    copy_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Report rows from the times of the workloads; speedups are relative to the fastest exact attention.

    Args:
        copy_rate: Bytes per second of a copy; None to leave memory out of the roofline.

    Example:
        >>> fields = {"length": 1024, "dtype": "float32"}
        >>> workloads = [Workload(mixer="sdpa", **fields), Workload(mixer="ovq", num_slots=64, **fields)]
        >>> [row["speedup"] for row in timed_rows("forward", workloads, [[2e-3] * 3, [1e-3] * 3], 1e12)]
        [1.0, 2.0]
    """
    rows = [w.row(part) | spread(times) for w, times in zip(workloads, all_times, strict=True)]
    exact = [row["seconds"] for row, w in zip(rows, workloads, strict=True) if w.cost == "exact"]
    for row, workload, times in zip(rows, workloads, all_times, strict=True):
        if exact:
            row["speedup"] = min(exact) / row["seconds"]
        at_least = 0.0 if copy_rate is None else workload.bytes(part) / copy_rate
        if part == "decode":
            row["seconds_mean"] = sum(times) / len(times)
        else:
            flops = workload.flops() + (workload.flops(backward=True) if part == "forward_backward" else 0)
            row["tokens_per_second"] = workload.length / row["seconds"]
            at_least = max(at_least, flops / matrix_rate)
        if at_least:
            row["roofline_share"] = at_least / row["seconds"]
    return rows
