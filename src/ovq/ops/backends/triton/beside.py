"""Reads beside the recurrence: a segment is read on a second CUDA stream while the next one is merged.

The recurrence is a chain of small launches that leaves most of a GPU idle, and the read of a segment needs
nothing but the dictionaries that the recurrence has written. With two sets of those, one is read while the
other is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, cuda

# Whether to do so. No GPU has run it yet; `benchmarks/gpu_report.py` checks and times it.
IS_ON = False


class Inline:
    """Reads where they are launched, in one set of dictionaries."""

    num_sets = 1

    def begin_writing(self, i: int) -> None:
        """Set i is to be written from here on."""

    def reading(self, i: int) -> contextlib.AbstractContextManager[None]:
        """A context: what is launched in it reads set i."""
        return contextlib.nullcontext()

    def join(self) -> None:
        """What is launched from here on sees all that was read."""


class Beside:
    """The same on a second stream; work launched so far on the current one comes first.

    Args:
        q: a tensor on the device.
    """

    num_sets = 2

    def __init__(self, q: Tensor) -> None:
        self._main, self._side = cuda.current_stream(q.device), cuda.Stream(q.device)
        self._read: list[cuda.Event | None] = [None, None]

    def begin_writing(self, i: int) -> None:
        """Wait, on the current stream, until set i has been read."""
        event = self._read[i]
        if event is not None:
            self._main.wait_event(event)

    @contextlib.contextmanager
    def reading(self, i: int) -> Iterator[None]:
        """A context: what is launched in it reads set i, as soon as that is written."""
        written = cuda.Event()
        written.record(self._main)
        self._side.wait_event(written)
        with cuda.stream(self._side):
            yield
        read = cuda.Event()
        read.record(self._side)
        self._read[i] = read

    def join(self) -> None:
        """Wait, on the current stream, for all that was read. After that its tensors may be freed there."""
        self._main.wait_stream(self._side)


def reads(q: Tensor) -> Inline | Beside:
    """How the segments of a call are read."""
    return Beside(q) if IS_ON and q.is_cuda else Inline()
