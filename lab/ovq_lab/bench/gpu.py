"""Measurements of `ovq bench --device cuda`: event timing, a flushed L2 cache, and a check of the trace."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ovq_lab.bench.measure import timed_rows
from ovq_lab.bench.rivals import RIVALS
from ovq_lab.bench.workloads import Workload

# Kernels of `ovq.ops.backends.triton`, by their names in the trace.
_OVQ_KERNELS = r"^(advance|nearest|read|read_token|grad_queries|grad_slots)$"
# Errors of mixers that cannot run: not installed, unsupported dtype or size, too little memory.
_REFUSALS = (ImportError, RuntimeError, ValueError, NotImplementedError)
# Warm-up calls, of which the first compiles and tunes kernels.
WARM_UP = 3


def measure(
    part: str, candidates: Sequence[Workload], matrix_rate: float, copy_rate: float, left_out: list[dict]
) -> list[dict[str, Any]]:
    """Measure one part at one length, with a check of the kernels that ran; returns rows.

    Args:
        matrix_rate: FLOP/s of matrix products in their dtype.
        copy_rate: Bytes per second of a copy.
        left_out: Workloads that cannot run are appended, as `{"label", "what", "length", "dtype", "reason"}`.
    """
    rows, ready, functions, kernels = [], [], [], []
    for workload in candidates:
        if part == "decode" and not workload.has_decode:
            continue
        row = workload.row(part)
        try:
            if part == "memory":
                peak = peak_allocated(functools.partial(workload.forward_backward, "cuda"))
                rows.append(row | {"peak_bytes": peak})
                continue
            function = getattr(workload, part)("cuda")
            kernels.append([event.key for event in kernel_events(function)])
        except _REFUSALS as error:
            [reason, *_] = str(error).strip().splitlines() or [""]
            found = {name: row[name] for name in ("label", "what", "length", "dtype")}
            left_out.append(found | {"reason": f"{type(error).__name__}: {reason}"})
        else:
            ready.append(workload)
            functions.append(function)
    if not ready:
        return rows
    # As many steps as a chunk has tokens, to include a merge of OVQ.
    run = {"max_rounds": 3, "run": ready[0].chunk_size} if part == "decode" else {}
    rows = timed_rows(part, ready, flushed_times(functions, **run), matrix_rate, copy_rate)
    for row, workload, names in zip(rows, ready, kernels, strict=True):
        pattern = _OVQ_KERNELS if workload.mixer == "ovq" else RIVALS[workload.mixer].kernels
        row |= {"kernels": names[:4], "is_intended": runs_intended(names, pattern)}
    return rows


def flushed_times(
    functions: Sequence[Callable[[], object]], *, max_rounds: int = 30, seconds: float = 3.0, run: int = 1
) -> list[list[float]]:
    """Seconds of each call of each function on the GPU. The functions take turns, with a flushed L2 cache.

    A call is timed from an idle GPU with an overwritten cache to the end of its last kernel. If the host
    launches kernels more slowly than the GPU runs them, the host's time therefore counts, as in a model.

    Args:
        seconds: Time of the slowest function after which no further round starts.
        run: Calls per turn.
    """
    # As many bytes as it takes to flush a call's inputs from the L2 cache.
    num_flushed = max(256 << 20, 4 * torch.cuda.get_device_properties("cuda").L2_cache_size)
    scratch = torch.empty(num_flushed, dtype=torch.int8, device="cuda")
    slowest = 0.0
    for function in functions:
        for _ in range(WARM_UP):
            slowest_call = _event_seconds(function, scratch)
        slowest = max(slowest, slowest_call)
    rounds = min(max_rounds, max(3, int(seconds / max(slowest * run, 1e-9))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for own_times, function in zip(times, functions, strict=True):
            own_times += [_event_seconds(function, scratch) for _ in range(run)]
    return times


def _event_seconds(function: Callable[[], object], scratch: torch.Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    scratch.zero_()
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_allocated(make: Callable[[], Callable[[], object]]) -> int:
    """Peak allocated bytes while `make` creates a call's inputs and the function it returns is called.

    Both are done once before the measurement, because compiling and tuning need memory too.
    """
    make()()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    make()()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate() -> float:
    """Bytes per second, read and written, of one large copy: the roofline of memory-bound calls."""
    size = 1 << 31
    source = torch.zeros(size, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / min(flushed_times([lambda: target.copy_(source)], seconds=1.0)[0])


def kernel_events(function: Callable[[], object]) -> list:
    """The profiler's averages of the kernels that a call runs, slowest first."""
    function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return slowest_first(profile.key_averages())


def slowest_first(events: Iterable) -> list:
    """The profiler's averages that ran on the device, slowest first."""
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(on_device, key=lambda e: -e.self_device_time_total)


def runs_intended(names: Sequence[str], pattern: str) -> bool:
    """Whether a kernel that matches `pattern` is among the slowest ones.

    Example:
        >>> runs_intended(["pytorch_flash::flash_fwd_kernel", "vectorized_add"], "flash")
        True
        >>> runs_intended(["gemm", "softmax"], "flash")
        False
    """
    return any(re.search(pattern, name, re.IGNORECASE) for name in names[:8])
