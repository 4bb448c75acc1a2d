"""The recurrence in CUDA graphs: the launches of a step are recorded once, and run by one call from then on.

A step is up to 3 small launches, and each takes the host some microseconds. Steps in which the same kernels
run on the same grids differ in nothing but the entries of their chunks. In a graph, kernels read those on the
device, where the first kernel of the step has left them.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor, cuda

from ovq.ops.backends.triton import common
from ovq.ops.backends.triton.work import At, Work

# Whether to do so. No GPU has run it yet; `benchmarks/gpu_report.py` checks and times it.
IS_ON = False
# Steps alike that a call must have: recording one takes longer than launching it.
FEWEST = 8

Shown = tuple[Tensor, Tensor, Tensor]


class Recurrence(Protocol):
    """What makes the steps of a call."""

    work: Work

    def step(self, i: int, shown: Shown | None = None, at: At | None = None) -> None:
        """Launch the kernels of step i."""


class Launched:
    """The steps of a call, whose kernels are launched one by one."""

    def __init__(self, recurrence: Recurrence) -> None:
        self._recurrence = recurrence

    def step(self, i: int, shown: Shown, base: int) -> None:
        """Run step i, which keeps in `shown` a dictionary of a segment that begins with entry `base`."""
        self._recurrence.step(i, shown, self._recurrence.work.at(i, base))


class Graph:
    """Launches that are recorded, and run whenever it is replayed.

    Args:
        launch: makes them; they are not run. It may neither allocate nor wait.
        device: where.
    """

    def __init__(self, launch: Callable[[], None], device: torch.device) -> None:
        self._graph = cuda.CUDAGraph()
        # The default stream cannot be recorded. Nothing runs on this one, so that it waits for none.
        with cuda.stream(cuda.Stream(device)):
            # Other threads may allocate and wait meanwhile.
            self._graph.capture_begin(capture_error_mode="thread_local")
            try:
                launch()
            finally:
                self._graph.capture_end()

    def replay(self) -> None:
        """Run them on the current stream."""
        self._graph.replay()


class Replayed(Launched):
    """The same, with a graph for steps that are alike.

    Args:
        recurrence: makes the steps. Its tensors stay where they are.
        segments: all steps of the call.
    """

    def __init__(self, recurrence: Recurrence, segments: list[range]) -> None:
        super().__init__(recurrence)
        work = recurrence.work
        device = work.table.device
        bases = [work.first[segment.start] for segment in segments for _ in segment]
        self._bases = torch.tensor(bases, dtype=torch.int32).to(device)
        # The step that comes next, and its entries, together and one by one.
        self._counter, self._entries = (torch.zeros(n, dtype=torch.int32, device=device) for n in (1, 3))
        self._next, self._at = 0, At(*self._entries.split(1))
        alike = Counter(work.kind(i) for segment in segments for i in segment)
        self._kinds = {kind for kind, num in alike.items() if kind is not None and num >= FEWEST}
        self._graphs: dict[tuple, Graph] = {}

    def step(self, i: int, shown: Shown, base: int) -> None:
        """See `Launched.step`."""
        kind = self._recurrence.work.kind(i)
        if kind not in self._kinds:
            super().step(i, shown, base)
            return
        if self._next != i:
            self._counter.fill_(i)
        self._next = i + 1
        # There may be two sets of dictionaries (`beside.py`).
        key = kind, shown[0].data_ptr()
        if key in self._graphs:
            self._graphs[key].replay()
            return
        launch = functools.partial(self._launch, i, shown)
        # The step itself. Kernels are compiled and loaded in it, which cannot be done while recording.
        launch()
        try:
            self._graphs[key] = Graph(launch, self._bases.device)
        except RuntimeError as error:
            warnings.warn(
                f"steps are launched one by one, as recording one failed: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            self._kinds.clear()

    def _launch(self, i: int, shown: Shown) -> None:
        """Launch a step, for which i need only be one that is like it."""
        work = self._recurrence.work
        begin_step[(1,)](
            self._counter, work.first_of_step, self._bases, self._entries, num_warps=1, **common.FUSED
        )
        self._recurrence.step(i, shown, self._at)


def steps_of(recurrence: Recurrence, segments: list[range]) -> Launched:
    """How the steps of a call are run."""
    # By "nearest" the host waits for what was decided. Where somebody else records the current stream, all
    # launches become a part of that graph.
    work = recurrence.work
    is_possible = work.options.merge != "nearest" and work.table.is_cuda
    is_possible = is_possible and not cuda.is_current_stream_capturing()
    return Replayed(recurrence, segments) if IS_ON and is_possible else Launched(recurrence)


@triton.jit
def begin_step(counter, first, bases, entries):
    """Leave the entries of the next step where its kernels read them, in the order of `At`; grid (1,).

    Args:
        counter: `[1]` int32 the step, from 1; one more on return.
        first: `[steps + 1]` int32 first entry of each step. bases: `[steps]` of its segment.
        entries: `[3]` int32 receives them.
    """
    step = tl.atomic_add(counter, 1)
    tl.store(entries, tl.load(first + step - 1))
    tl.store(entries + 1, tl.load(first + step))
    tl.store(entries + 2, tl.load(bases + step))
