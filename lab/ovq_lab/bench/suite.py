"""Which measurements make a report: lengths, dtypes and dictionary sizes, as JSON rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from ovq.ops import backend_used, cpu_kernels
from ovq_lab.bench import gpu, gpu_suite
from ovq_lab.bench.measure import interleaved, matrix_rate, peak_bytes, timed_rows
from ovq_lab.bench.rivals import RIVALS
from ovq_lab.bench.workloads import Shape, Workload, contenders
from ovq_lab.runtime.environment import environment

PARTS = ("forward", "forward_backward", "decode", "memory", "stream")
STREAM_TOKENS = 1 << 20
STREAM_PIECE = 16384


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """What to measure.

    Attributes:
        parts: Some of `PARTS`.
        lengths: Tokens T, ascending.
        dtypes: `"float32"`, `"bfloat16"` or both.
        num_slots: Dictionary sizes N of OVQ.
        merges: Its merge rules, each with the growth that it is meant for.
        chunk_size: C, and the width of the window.
        num_heads: H.
        head_dim: K = V.
        device: `"cpu"` or `"cuda"`.

    Example:
        >>> Suite(parts=("forward",), lengths=(1024,), dtypes=("float32",), num_slots=(64,)).total
        1
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
        for name, found, allowed in (
            ("--what", self.parts, PARTS),
            ("--dtypes", self.dtypes, ("float32", "bfloat16")),
        ):
            unknown = [x for x in found if x not in allowed]
            if unknown or not found:
                raise ValueError(
                    f"{name}: expected some of {', '.join(allowed)}, found {', '.join(unknown) or 'none'}"
                )
        for name in ("chunk_size", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}"
                )
        if self.device != "cpu":
            if not torch.cuda.is_available():
                raise ValueError(f"--device: expected cpu (PyTorch sees no GPU here), found {self.device}")
            if "stream" in self.parts:
                raise ValueError("--what: expected no stream with --device cuda, found stream")

    @property
    def total(self) -> int:
        """Number of pieces of work, for a progress bar."""
        timed = [p for p in self.parts if p not in ("stream",)]
        return len(timed) * len(self.dtypes) * len(self.lengths) + ("stream" in self.parts)

    def workloads(self, length: int, dtype: str) -> list[Workload]:
        """Exact attention, the window (on a GPU: all rivals), and OVQ at every size and by every rule, at one
        length."""
        shape: Shape = {
            "length": length,
            "dtype": dtype,
            "chunk_size": self.chunk_size,
            "num_heads": self.num_heads,
            "head_dim": self.head_dim,
        }
        others = ("sdpa", "window") if self.device == "cpu" else RIVALS
        return contenders(others, shape, self.num_slots, self.merges)


def run_suite(suite: Suite, progress: Callable[[int, str], None]) -> dict:
    """Measure everything.

    Args:
        suite: What to measure.
        progress: Called with the number of finished pieces and a note.

    Returns:
        `{"environment", "suite", "matrix_rate", "rows", "crossover"}`: the report, as JSON types. A row has
        `what`, `mixer`, `label`, `num_slots`, `merge`, `length`, `dtype` and, depending on what was measured,
        seconds (median, smallest, largest), tokens per second, times faster than SDPA, share of the roofline,
        or bytes. On a GPU the report also has `copy_rate` and `left_out` (what could not run, and why), and
        each row the kernels seen in the trace and whether they are the intended ones.
    """
    rates = {
        dtype: matrix_rate(dtype, device=suite.device, num_heads=suite.num_heads) for dtype in suite.dtypes
    }
    copy_rate = None if suite.device == "cpu" else gpu.copy_rate(suite.device)
    rows: list[dict] = []
    left_out: list[dict] = []
    backends: dict[str, str | None] = {}
    done = 0
    for part, dtype, length in itertools.product(suite.parts, suite.dtypes, suite.lengths):
        if part == "stream":
            continue
        progress(done, f"{part} {dtype} {length}")
        workloads = suite.workloads(length, dtype)
        if copy_rate is None:
            measure = _memory_rows if part == "memory" else _timed_rows
            rows += measure(part, workloads, suite.device, rates[dtype])
        else:
            found, refused = gpu_suite.measure(part, workloads, rates[dtype], copy_rate)
            rows += [{**_row(part, row.pop("workload")), **row} for row in found]
            left_out += refused
        if part != "memory":
            # Memory is measured in separate processes, and so is the stream.
            backends[part] = backend_used()
        done += 1
    if "stream" in suite.parts:
        progress(done, f"stream {STREAM_TOKENS}")
        rows.append(_stream_row(suite))
        done += 1
    progress(done, "done")
    return {
        "environment": environment(suite.device) | {"backends": backends, "cpu_kernels": cpu_kernels()},
        "suite": dataclasses.asdict(suite),
        "matrix_rate": rates,
        **({} if copy_rate is None else {"copy_rate": copy_rate, "left_out": left_out}),
        "rows": rows,
        "crossover": crossovers(rows),
    }


def _row(what: str, workload: Workload) -> dict:
    return {
        "what": what,
        "mixer": workload.mixer,
        "label": workload.label,
        "num_slots": workload.num_slots,
        "merge": workload.merge if workload.mixer == "ovq" else None,
        "length": workload.length,
        "dtype": workload.dtype,
    }


def _timed_rows(part: str, workloads: list[Workload], device: str, rate: float) -> list[dict]:
    """Times of one part at one length; mixers take turns."""
    functions = [getattr(w, part)(device) for w in workloads]
    # A merge comes once per chunk, so each turn of decode takes as many tokens as a chunk has, to include
    # one. There are few turns, because exact attention over a long cache takes long.
    rounds, run = (3, workloads[0].chunk_size) if part == "decode" else (9, 1)
    all_times = interleaved(functions, device=device, max_rounds=rounds, run=run)
    rows = timed_rows(part, workloads, all_times, rate)
    return [{**_row(part, w), **row} for w, row in zip(workloads, rows, strict=True)]


def _memory_rows(part: str, workloads: list[Workload], device: str, rate: float) -> list[dict]:
    """Peak bytes of a forward and backward, everything included, each in a process of its own."""
    return [
        {
            **_row(part, w),
            **peak_bytes({"what": "forward_backward", "workload": dataclasses.asdict(w)}),
        }
        for w in workloads
    ]


def _stream_row(suite: Suite) -> dict:
    workload = suite.workloads(STREAM_TOKENS, "float32")[2]
    call = {"what": "stream", "workload": dataclasses.asdict(workload), "piece": STREAM_PIECE}
    return {**_row("stream", workload), **peak_bytes(call)}


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
