"""What a layer keeps so that its last tokens can be taken out again, for `MemoryLayer.crop`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ovq.convert.memory import HeadMemory


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """What there is to go back by.

    Attributes:
        num_columns: those that were read before.
        before: copies of the memories before the first call that merged, or brought rows nearer.
        keys: `[1, Hkv, T, K]` of the real tokens from that call on; None if there was none. values: likewise.
    """

    num_columns: int
    before: Sequence[HeadMemory] = ()
    keys: Tensor | None = None
    values: Tensor | None = None


def put_back_(memory: HeadMemory, before: HeadMemory) -> None:
    """Let a memory remember what a copy of it does, in the same tensors, which kernels know."""
    memory.own_()
    tensors = memory.tensors()
    for name, tensor in before.tensors().items():
        tensors[name].copy_(tensor)
    memory.filled, memory.num_merged = list(before.filled), list(before.num_merged)


def drop_(memory: HeadMemory, num_tokens: int) -> None:
    """Let a memory forget the last tokens of each row, which have come after its last merge."""
    memory.own_()
    for row, filled in enumerate(memory.filled):
        for recent in (memory.recent_keys, memory.recent_values):
            recent[row, :, filled - num_tokens : filled] = 0
        memory.filled[row] = filled - num_tokens
