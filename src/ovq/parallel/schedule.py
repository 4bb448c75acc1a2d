"""The order in which a rank processes micro-batches.

Rank r reads the r-th part of a document. In each layer it needs the state of rank r - 1 after *its* part, and
in the backward the gradient of the state that it passed to rank r + 1. So the ranks form a pipeline whose
unit is one layer of one micro-batch: forward from the first rank to the last, backward the other way.

Messages of one direction are sent in the order in which they are received, and sending never blocks. So a
rank only waits for units that come earlier in its neighbour's own order, and there can be no deadlock;
`tests/parallel/test_schedule.py` simulates the schedule.
"""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """One micro-batch through all layers, forward or backward."""

    micro_batch: int
    is_forward: bool

    def __str__(self) -> str:
        return f"{'F' if self.is_forward else 'B'}{self.micro_batch}"


def steps_of_rank(
    rank: int, *, num_ranks: int, num_micro_batches: int, max_in_flight: int | None = None
) -> list[Step]:
    """The steps of a rank in order: one forward, one backward (1F1B).

    A rank that is d ranks before the last begins with d forwards, and then runs a backward after each further
    forward. So it keeps the activations of at most d + 1 micro-batches, and the last rank never waits.

    Args:
        rank: r.
        num_ranks: R.
        num_micro_batches: M.
        max_in_flight: Most micro-batches whose activations a rank keeps at a time, at least 1. A smaller
            number saves memory and makes ranks wait.

    Example:
        >>> [" ".join(map(str, steps_of_rank(r, num_ranks=2, num_micro_batches=3))) for r in range(2)]
        ['F0 F1 B0 F2 B1 B2', 'F0 B0 F1 B1 F2 B2']
    """
    num_ahead = min(num_ranks - 1 - rank, num_micro_batches)
    if max_in_flight is not None:
        num_ahead = min(num_ahead, max_in_flight - 1)
    steps = [Step(micro_batch=m, is_forward=True) for m in range(num_ahead)]
    for m in range(num_micro_batches):
        if m + num_ahead < num_micro_batches:
            steps.append(Step(micro_batch=m + num_ahead, is_forward=True))
        steps.append(Step(micro_batch=m, is_forward=False))
    return steps
