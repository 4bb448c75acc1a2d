"""Measurements of a report over lengths, dtypes and dictionary sizes, as JSON rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ovq.ops import backend_used
from ovq.runtime.progress import WorkReporter
from ovq_lab.bench import gpu
from ovq_lab.bench.measure import (
    Piece,
    as_report,
    do_pieces,
    interleaved,
    matrix_rate,
    peak_bytes,
    timed_rows,
)
from ovq_lab.bench.rivals import ON_CPU, RIVALS
from ovq_lab.bench.workloads import Workload

STREAM_TOKENS = 1 << 20
STREAM_PIECE = 16384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """Settings of a measurement.

    Attributes:
        parts: Names in `ovq_lab.bench.PARTS`.
        num_slots: Dictionary sizes N of OVQ.
        merges: Merge rules of OVQ, each with its default growth.
        chunk_size: C, and the width of the window.
    """

    parts: Sequence[str]
    lengths: Sequence[int]
    dtypes: Sequence[str]
    num_slots: Sequence[int]
    merges: Sequence[str] = ("existing",)
    chunk_size: int = 256
    num_heads: int = 8
    head_dim: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device != "cpu":
            if not torch.cuda.is_available():
                raise ValueError(f"--device: expected cpu (PyTorch sees no GPU here), found {self.device}")
            if "stream" in self.parts:
                raise ValueError("--what: expected no stream with --device cuda, found stream")

    def workloads(self, length: int, dtype: str) -> list[Workload]:
        """Other mixers, and OVQ with every size and merge rule, at one length."""
        shape: dict[str, Any] = {
            "length": length,
            "dtype": dtype,
            "chunk_size": self.chunk_size,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
        }
        others = [name for name in RIVALS if (name in ON_CPU) == (self.device == "cpu")]
        ovq = itertools.product(self.num_slots, self.merges)
        return [
            *(Workload(mixer=name, **shape) for name in others),
            *(Workload(mixer="ovq", num_slots=n, merge=rule, **shape) for n, rule in ovq),
        ]


def run_suite(suite: Suite, reporter: WorkReporter) -> dict[str, Any]:
    """Run a suite.

    Returns:
        `{"environment", "suite", "matrix_rate", "rows", "crossover"}`: the report, as JSON types. A row has
        `what`, `mixer`, `label`, `num_slots`, `merge`, `length`, `dtype` and, depending on the part, seconds
        (median, smallest, largest), tokens per second, speedup over SDPA, share of the roofline, or bytes. On
        a GPU the report also has `copy_rate` and `left_out` (workloads that could not run, and why), and each
        row the kernels in the trace and whether they are the intended ones.
    """
    rates = {
        dtype: matrix_rate(dtype, device=suite.device, num_heads=suite.num_heads) for dtype in suite.dtypes
    }
    of_gpu: dict[str, Any] = {}
    if suite.device != "cpu":
        of_gpu = {"copy_rate": gpu.copy_rate(), "left_out": []}
    backends: dict[str, str | None] = {}

    def measure(part: str, dtype: str, length: int) -> list[dict]:
        workloads = suite.workloads(length, dtype)
        if of_gpu:
            rows = gpu.measure(part, workloads, rates[dtype], **of_gpu)
        elif part == "memory":
            # Inputs included, each in a process of its own.
            return [w.row("memory") | peak_bytes("forward_backward", w) for w in workloads]
        else:
            rows = _timed_rows(part, workloads, rates[dtype])
        backends[part] = backend_used()
        return rows

    parts = [part for part in suite.parts if part != "stream"]
    pieces: list[Piece] = [
        (f"{part} {dtype} {length}", partial(measure, part, dtype, length))
        for part, dtype, length in itertools.product(parts, suite.dtypes, suite.lengths)
    ]
    if "stream" in suite.parts:
        pieces += [
            (f"stream {STREAM_TOKENS} {workload.label}", partial(_stream_rows, workload))
            for workload in suite.workloads(STREAM_TOKENS, "float32")
            if workload.mixer == "ovq"
        ]
    rows = do_pieces(pieces, reporter)
    return as_report(
        rows,
        suite=dataclasses.asdict(suite),
        matrix_rate=rates,
        device=suite.device,
        backends=backends,
        crossover=crossovers(rows),
        **of_gpu,
    )


def _timed_rows(part: str, workloads: list[Workload], rate: float) -> list[dict]:
    """Times of one part at one length; mixers take turns."""
    functions = [getattr(w, part)("cpu") for w in workloads]
    # A merge occurs once per chunk, so each turn of decode has as many tokens as a chunk, to include one.
    # There are few turns, because exact attention over a long cache is slow.
    rounds, run = (3, workloads[0].chunk_size) if part == "decode" else (9, 1)
    return timed_rows(part, workloads, interleaved(functions, max_rounds=rounds, run=run), rate)


def _stream_rows(workload: Workload) -> list[dict]:
    return [workload.row("stream") | peak_bytes("stream", workload, piece=STREAM_PIECE)]


def crossovers(rows: Sequence[dict]) -> list[dict]:
    """The shortest measured length from which OVQ stays faster than SDPA, for each size, dtype and part.

    Example:
        >>> fields = {"what": "forward", "mixer": "ovq", "label": "OVQ", "dtype": "float32"}
        >>> speedups = {1024: 0.8, 2048: 1.1, 4096: 1.9}
        >>> rows = [{**fields, "length": t, "speedup": s} for t, s in speedups.items()]
        >>> crossovers(rows)
        [{'what': 'forward', 'dtype': 'float32', 'label': 'OVQ', 'length': 2048}]
    """
    found = []
    timed = [r for r in rows if r["mixer"] == "ovq" and "speedup" in r]
    for what, dtype, label in dict.fromkeys((r["what"], r["dtype"], r["label"]) for r in timed):
        line = sorted(
            (r for r in timed if (r["what"], r["dtype"], r["label"]) == (what, dtype, label)),
            key=lambda r: r["length"],
        )
        length = None
        for row in reversed(line):
            if row["speedup"] <= 1:
                break
            length = row["length"]
        found.append({"what": what, "dtype": dtype, "label": label, "length": length})
    return found
