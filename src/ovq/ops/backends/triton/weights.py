"""Token weights for the kernels, and the copies of slots that the backward needs with them.

Subtracting a token from a float32 sum leaves a rounding error, which may exceed the contents of a slot of
small weight (`docs/method/math.md`, section 8). With token weights, the forward therefore copies the slots
that a chunk is about to change, and the backward restores them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ovq.ops.backends.triton.work import Work
from ovq.ops.sums import log_token_weights


class ChangedSlots(NamedTuple):
    """Copies of slots before a chunk changed them, at most C per chunk.

    Attributes:
        keys: `[entries, Hkv, C, K]` float32 sums. values: `[entries, Hkv, C, V]`.
        weight: `[entries, Hkv, C]` float32.
        slot: `[entries, Hkv, C]` int32 indices of these slots, -1 after the last, for rules that merge pairs.
            None for routing: a slot is then stored at the position of its first token in the chunk.
    """

    keys: Tensor
    values: Tensor
    weight: Tensor
    slot: Tensor | None

    @classmethod
    def empty(cls, work: Work, k: Tensor, v: Tensor) -> ChangedSlots:
        """Room for all chunks of a call."""
        shape = (work.first[-1], work.num_kv_heads, work.options.chunk_size)
        keys, values = (x.new_empty(*shape, x.shape[-1], dtype=torch.float32) for x in (k, v))
        slot = k.new_empty(shape, dtype=torch.int32) if work.options.merges_pairs else None
        return cls(keys, values, k.new_empty(shape, dtype=torch.float32), slot)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The token weights of a call.

    Attributes:
        tokens: `[num_chunks, W, Hkv]` float32, contiguous.
        kept: receives the slots that the backward restores; None without a backward.
        is_read: whether tokens of the own chunk are read with their weights.
    """

    tokens: Tensor
    kept: ChangedSlots | None = None
    is_read: bool = False

    @property
    def own_bias(self) -> Tensor | None:
        """Log2 weights with which tokens of the own chunk are read; None if they are read without weights."""
        return log_token_weights(self.tokens) / math.log(2) if self.is_read else None
