"""Weights of tokens: what the kernels are told of them, and what the backward needs beside them.

Taking a token back from a float32 sum leaves an error of the size of its rounding, which may be all that a
slot of little weight holds (`docs/method/math.md`, section 8). So where tokens have weights, the forward
keeps the slots that a chunk changes as they were, and the backward puts them back.
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
    """Slots as they were before a chunk changed them: at most as many as the chunk has tokens.

    Attributes:
        keys: `[entries, Hkv, C, K]` float32 sums. values: `[entries, Hkv, C, V]`.
        weight: `[entries, Hkv, C]` float32.
        slot: `[entries, Hkv, C]` int32 which slots these are, -1 after the last, where pairs are merged. None
            where keys are routed: a slot is then kept in the place of the first token that it got.
    """

    keys: Tensor
    values: Tensor
    weight: Tensor
    slot: Tensor | None

    @classmethod
    def empty(cls, work: Work, k: Tensor, v: Tensor) -> ChangedSlots:
        """Room for all chunks of a call."""
        shape = (work.first[-1], work.num_kv_heads, work.options.chunk_size)

        def empty(*dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(*shape, *dims, dtype=dtype, device=k.device)

        slot = empty(dtype=torch.int32) if work.options.merges_pairs else None
        return cls(empty(k.shape[-1]), empty(v.shape[-1]), empty(), slot)


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of a call's tokens.

    Attributes:
        tokens: `[num_chunks, W, Hkv]` float32, contiguous.
        kept: receives what the backward needs; None if there will be none.
        is_read: whether tokens of the own chunk are read with their weights.
    """

    tokens: Tensor
    kept: ChangedSlots | None = None
    is_read: bool = False

    @property
    def own_bias(self) -> Tensor | None:
        """Log2 weights with which tokens of the own chunk are read; None where they are read without."""
        return log_token_weights(self.tokens) / math.log(2) if self.is_read else None
