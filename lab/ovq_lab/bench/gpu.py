"""How `ovq bench --device cuda` measures: events around calls, a cold cache, and a check of the trace."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence

import torch

# Calls before the first one that counts; the first of them compiles and tunes kernels.
WARM_UP = 3


def flushed_times(
    functions: Sequence[Callable[[], object]], *, max_rounds: int = 30, seconds: float = 3.0, run: int = 1
) -> list[list[float]]:
    """Seconds of each call of each function on the GPU. The functions take turns, with an empty L2 cache.

    The time of a call runs from when the GPU is idle and the cache overwritten to the end of its last kernel.
    Where the host cannot launch kernels as fast as the GPU runs them, the host's time therefore counts, as it
    does in a model.

    Args:
        functions: What to time; each is warmed up first.
        max_rounds: Most rounds.
        seconds: Time after which no further round of the slowest function starts.
        run: Calls per turn.
    """
    scratch = torch.empty(flush_bytes(), dtype=torch.int8, device="cuda")
    slowest = 0.0
    for function in functions:
        for _ in range(WARM_UP):
            slowest_call = _event_seconds(function, scratch)
        slowest = max(slowest, slowest_call)
    rounds = min(max_rounds, max(3, int(seconds / max(slowest * run, 1e-9))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for times_of_one, function in zip(times, functions, strict=True):
            times_of_one += [_event_seconds(function, scratch) for _ in range(run)]
    return times


def flush_bytes() -> int:
    """Bytes to write so that the L2 cache keeps nothing of a call's inputs."""
    return max(256 << 20, 4 * torch.cuda.get_device_properties("cuda").L2_cache_size)


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
    """The most bytes allocated while `make` makes a call's inputs and the function it returns is called.

    This is done once beforehand, because compiling and tuning need memory of their own.
    """
    make()()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    make()()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate(device: str) -> float:
    """Bytes per second that one large copy reads and writes: the roofline of what memory limits."""
    size = 1 << 28 if device == "cpu" else 1 << 31
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    if device != "cpu":
        return 2 * size / min(flushed_times([copy], seconds=1.0)[0])
    copy()
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        copy()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size / fastest


def kernel_names(function: Callable[[], object]) -> list[str]:
    """Names of the kernels that a call runs, those that take longest first."""
    function()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return names_by_time(profile.key_averages())


def names_by_time(events: Iterable) -> list[str]:
    """Names of the profiler's averages that ran on the device, those that took longest first."""
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return [e.key for e in sorted(on_device, key=lambda e: -e.self_device_time_total)]


def runs_intended(names: Sequence[str], pattern: str) -> bool:
    """Whether a kernel that matches `pattern` is among those that take longest.

    Example:
        >>> runs_intended(["pytorch_flash::flash_fwd_kernel", "vectorized_add"], "flash")
        True
        >>> runs_intended(["gemm", "softmax"], "flash")
        False
    """
    return any(re.search(pattern, name, re.IGNORECASE) for name in names[:8])
