"""Growth schedules: the number of slots in the dictionary after t tokens.

The schedule depends only on the number of tokens seen, so a stream opens the same slots at the same chunks
however it is split into calls.
"""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

GROWTHS = ("plateau", "linear", "immediate")

_Number = TypeVar("_Number", int, Tensor)


def scheduled_slots(num_seen: int, *, num_slots: int, growth: str = "plateau") -> int:
    """Number of slots that the schedule prescribes once `num_seen` tokens have been merged.

    Args:
        num_seen: number t of tokens that the row has seen, a multiple of the chunk size.
        num_slots: the maximum number of slots, N.
        growth: `"plateau"`, floor(t N / (t + N)), the paper's schedule; `"linear"`, min(N, floor(t / 2)),
            which crosses the plateau at t = N (the slope is this project's choice); `"immediate"`, min(N, t),
            one slot per key while there is room.

    Returns:
        The number of slots, at least 1 and at most `num_slots`.

    Raises:
        ValueError: if `growth` is unknown, or a number is out of range.

    Source: arXiv 2602.03922 for the plateau; the other two are reconstructed from its ablations.

    Example:
        >>> [scheduled_slots(t, num_slots=64) for t in (32, 64, 256, 4096)]
        [21, 32, 51, 63]
        >>> scheduled_slots(32, num_slots=64, growth="immediate")
        32
    """
    if num_seen < 0 or num_slots < 1:
        raise ValueError(
            "expected num_seen of at least 0 and num_slots of at least 1, "
            f"found num_seen={num_seen} and num_slots={num_slots}"
        )
    if growth == "plateau":
        wanted = num_seen * num_slots // (num_seen + num_slots)
    elif growth == "linear":
        wanted = num_seen // 2
    elif growth == "immediate":
        wanted = num_seen
    else:
        raise ValueError(f"growth: expected one of {GROWTHS}, found {growth!r}")
    return max(1, min(wanted, num_slots))


def grown_slots(current: int, num_seen: int, *, num_slots: int, chunk_size: int, growth: str) -> int:
    """Number of slots after the chunk that ends at token `num_seen`, given `current` slots before it.

    The number never shrinks here, and a chunk of C tokens opens at most C slots (which matters only after
    `OVQState.resize` has raised N in mid-stream).

    Example:
        >>> grown_slots(0, 32, num_slots=64, chunk_size=32, growth="plateau")
        21
        >>> grown_slots(21, 64, num_slots=4096, chunk_size=32, growth="immediate")
        53
    """
    wanted = scheduled_slots(num_seen, num_slots=num_slots, growth=growth)
    return min(max(current, wanted), current + chunk_size)


def slots_by_chunk(
    current: int, num_merged: int, num_chunks: int, *, num_slots: int, chunk_size: int, growth: str
) -> list[int]:
    """Number of slots before each of the next `num_chunks` chunks and after the last: num_chunks + 1 numbers.

    Example:
        >>> slots_by_chunk(0, 0, 3, num_slots=64, chunk_size=32, growth="plateau")
        [0, 21, 32, 38]
    """
    sizes = [current]
    for i in range(1, num_chunks + 1):
        seen = num_merged + i * chunk_size
        sizes.append(grown_slots(sizes[-1], seen, num_slots=num_slots, chunk_size=chunk_size, growth=growth))
    return sizes


def tokens_merged(
    num_seen: _Number, *, chunk_size: int, num_sinks: int = 0, window: int | None = None
) -> _Number:
    """Number of tokens of a row that were merged once it has seen `num_seen`.

    Args:
        num_seen: one number, or a tensor of numbers.
        chunk_size: C, the number of tokens merged at a time.
        num_sinks: S, first tokens that are never merged.
        window: W, places for the tokens after them; tokens are merged when these are full. None for C.

    Example:
        >>> [tokens_merged(t, chunk_size=8) for t in (7, 8, 20)]
        [0, 8, 16]
        >>> [tokens_merged(t, chunk_size=8, num_sinks=4, window=16) for t in (19, 20, 28)]
        [0, 8, 16]
    """
    beyond = num_seen - num_sinks - (chunk_size if window is None else window) + chunk_size
    beyond = beyond * (beyond > 0)
    return beyond - beyond % chunk_size
