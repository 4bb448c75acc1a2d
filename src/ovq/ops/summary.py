"""`StateSummary`: summary statistics of a state."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateSummary:
    """Summary statistics of a state; `str` gives them in words.

    Attributes:
        num_seen: number of tokens that each row has seen.
        num_pending: number of pending tokens of each row.
        num_open: number of slots in use in each row, per key/value head.
        num_slots: N, the maximum number of slots per head.
        nbytes: total bytes of all tensors of the state.
        largest_count: maximum number of tokens in one slot, over all rows and heads.
        single_share: share of the slots in use that hold a single token, over all rows and heads.
        effective_slots: for each row, the mean over its heads of exp(H), where H is the entropy of the
            distribution of tokens over slots: the number of slots if all hold equally many tokens; slots with
            hardly any tokens add hardly anything.

    Example:
        >>> import torch
        >>> from ovq.ops import ovq_attention
        >>> k = torch.eye(3)[[0, 0, 0, 1, 2, 2, 0]][None, :, None]
        >>> _, state = ovq_attention(
        ...     k, k, k, num_slots=3, chunk_size=6, merge="nearest", output_final_state=True
        ... )
        >>> state.count.tolist(), state.summary().largest_count, state.summary().single_share
        ([[[3, 1, 2]]], 3, 0.3333333333333333)
        >>> print(state.summary())
        7 tokens seen, 1 pending; 3 of 3 slots in use per head; 248 bytes
        at most 3 tokens in a slot; 33.3% of slots with a single token; as good as 2.7 equal slots
    """

    num_seen: tuple[int, ...]
    num_pending: tuple[int, ...]
    num_open: tuple[int, ...]
    num_slots: int
    nbytes: int
    largest_count: int
    single_share: float
    effective_slots: tuple[float, ...]

    @classmethod
    def of(cls, state: Any) -> StateSummary:
        """The statistics of an `OVQState`."""
        count = state.count
        total_open = int((count > 0).sum())
        return cls(
            num_seen=tuple(state.num_seen.tolist()),
            num_pending=tuple(state.num_pending.tolist()),
            num_open=tuple(state.num_open.tolist()),
            num_slots=state.num_slots,
            nbytes=state.nbytes,
            largest_count=int(count.max()) if total_open else 0,
            single_share=int((count == 1).sum()) / max(1, total_open),
            effective_slots=tuple(effective_slots(count).mean(-1).tolist()),
        )

    def __str__(self) -> str:
        rows = "" if len(self.num_seen) == 1 else f"{len(self.num_seen)} rows; "
        return (
            f"{rows}{_range(self.num_seen)} tokens seen, {_range(self.num_pending)} pending; "
            f"{_range(self.num_open)} of {self.num_slots:,} slots in use per head; {self.nbytes:,} bytes\n"
            f"at most {self.largest_count:,} tokens in a slot; {self.single_share:.1%} of slots with a "
            f"single token; as good as {_range(self.effective_slots)} equal slots"
        )


def effective_slots(count: Tensor) -> Tensor:
    """Effective number of slots of each head, `[B, Hkv]`: the exponential of the entropy of the counts.

    Args:
        count: `[B, Hkv, M]` number of tokens in each slot.

    Example:
        >>> effective_slots(torch.tensor([[[5, 5, 0], [0, 0, 0]]]))
        tensor([[2., 0.]], dtype=torch.float64)
    """
    total = count.sum(-1, keepdim=True)
    entropy = torch.special.entr(count.double() / total.clamp(min=1)).sum(-1)
    # 0 for a head without tokens, where exp(0) would be 1.
    return torch.where(total[..., 0] > 0, entropy.exp(), 0)


def _range(values: tuple[int, ...] | tuple[float, ...]) -> str:
    """Values of all rows as text: one number if they are equal, else the minimum and the maximum.

    Example:
        >>> _range((5000, 5000)), _range((1.25, 3.0)), _range(())
        ('5,000', '1.2 to 3.0', 'no')
    """
    if not values:
        return "no"
    low, high = (f"{x:,.1f}" if isinstance(x, float) else f"{x:,}" for x in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
