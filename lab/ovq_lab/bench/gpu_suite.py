"""One measurement of `ovq bench --device cuda`: all mixers at one length, with a check of their kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ovq_lab.bench import gpu
from ovq_lab.bench.measure import timed_rows
from ovq_lab.bench.rivals import RIVALS
from ovq_lab.bench.workloads import Workload

# Kernels of `ovq.ops.backends.triton`, as they are named in the trace.
_OVQ_KERNELS = r"^(advance|nearest|read|read_token|grad_queries|grad_slots)$"
# Errors of mixers that cannot run: not installed, a dtype or size that is not supported, too little memory.
_REFUSALS = (ImportError, RuntimeError, ValueError, NotImplementedError)


def measure(
    part: str, candidates: Sequence[Workload], matrix_rate: float, copy_rate: float
) -> tuple[list[dict], list[dict]]:
    """The rows of one part at one length, without `what` and `mixer`, and what could not run here.

    Args:
        part: `"forward"`, `"forward_backward"`, `"decode"` or `"memory"`.
        candidates: The workloads to measure.
        matrix_rate: FLOP/s of matrix products in their dtype.
        copy_rate: Bytes per second of a copy.

    Returns:
        For each workload that runs, `{"workload": ..., fields of the row}`; for each other, `{"label",
        "what", "length", "dtype", "reason"}`.
    """
    rows, left_out, ready = [], [], []
    for workload in candidates:
        if part == "decode" and not workload.has_decode:
            continue
        try:
            if part == "memory":
                peak = gpu.peak_allocated(functools.partial(workload.forward_backward, "cuda"))
                rows.append({"workload": workload, "peak_bytes": peak})
            else:
                function = getattr(workload, part)("cuda")
                ready.append((workload, function, gpu.kernel_names(function)))
        except _REFUSALS as error:
            left_out.append(_left_out(part, workload, error))
    if ready:
        rows = _timed(part, ready, matrix_rate, copy_rate)
    return rows, left_out


def _left_out(part: str, workload: Workload, error: Exception) -> dict:
    reason = str(error).strip().splitlines() or [""]
    return {
        "label": workload.label,
        "what": part,
        "length": workload.length,
        "dtype": workload.dtype,
        "reason": f"{type(error).__name__}: {reason[0]}",
    }


def _timed(
    part: str,
    ready: Sequence[tuple[Workload, Callable[[], object], list[str]]],
    matrix_rate: float,
    copy_rate: float,
) -> list[dict]:
    # Enough steps to pass the end of a chunk, where OVQ merges.
    run = {"max_rounds": 3, "run": ready[0][0].chunk_size} if part == "decode" else {}
    all_times = gpu.flushed_times([function for _, function, _ in ready], **run)
    rows = timed_rows(part, [workload for workload, _, _ in ready], all_times, matrix_rate, copy_rate)
    for row, (workload, _, names) in zip(rows, ready, strict=True):
        pattern = RIVALS[workload.mixer].kernels if workload.mixer in RIVALS else _OVQ_KERNELS
        row |= {"workload": workload, "kernels": names[:4]}
        row["is_intended"] = gpu.runs_intended(names, pattern)
    return rows
