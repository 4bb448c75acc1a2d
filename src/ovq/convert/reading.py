"""How queries read the memory of a head without compiled kernels: one softmax over exact tokens and slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Queries read at a time, which bounds the memory for their scores.
_QUERIES = 256


class Exact(NamedTuple):
    """Tokens that are kept exactly, those of the queries included.

    Attributes:
        keys: `[B, h, P, K]`, in the order of the tokens. values: `[B, h, P, V]`.
        filled: tokens of each row before its first query.
    """

    keys: Tensor
    values: Tensor
    filled: Sequence[int]


class Slots(NamedTuple):
    """Slots in use.

    Attributes:
        keys: `[B, h, N, K]` means. values: `[B, h, N, V]`, likewise.
        counts: `[B, h, N]` tokens in each; 0 for rows that have fewer slots.
    """

    keys: Tensor
    values: Tensor
    counts: Tensor


class Observer(Protocol):
    """Who wants to know what a memory reads, and where its tokens go."""

    def has_read(self, exact: Exact, slots: Slots | None, probs: Tensor) -> None:
        """The next queries, not more than are read at a time, have read `exact` and `slots`.

        Args:
            exact: see there. slots: likewise.
            probs: `[B, h, G, n, P + N]` weights of n queries on the first P exact tokens and on the slots.
        """

    def has_merged(self, homes: Tensor | None) -> None:
        """The oldest tokens after the sinks have been merged.

        Args:
            homes: `[R, h, N + C]` slots that the contents of the slots and these tokens went to; None if the
                tokens were dropped.
        """


def read(
    q: Tensor,
    exact: Exact,
    slots: Slots | None,
    *,
    dtype: torch.dtype,
    temperature: Tensor | None,
    bias: Tensor | None,
    observer: Observer | None = None,
) -> Tensor:
    """Outputs `[B, h * G, n, V]` in the dtype of the queries.

    Args:
        q: `[B, h * G, n, K]`, scaled, of tokens one after the other.
        exact: what they read of single tokens. slots: of means; None if there are none.
        dtype: in which to compute.
        temperature: `[h * G]` factor of the scores of slots of several tokens. bias: likewise, what is added.
        observer: is told of what the queries read.
    """
    batch, heads, outputs = len(q), exact.keys.shape[1], []
    for start, block in zip(range(0, q.shape[2], _QUERIES), q.split(_QUERIES, dim=2), strict=True):
        num_queries = block.shape[2]
        used = min(max(exact.filled) + start + num_queries, exact.keys.shape[2])
        queries = block.to(dtype).reshape(batch, heads, -1, q.shape[3])
        # [B, h, G, n, places]
        scores = queries @ exact.keys[:, :, :used].to(dtype).transpose(2, 3)
        scores = scores.unflatten(2, (-1, num_queries))
        steps = torch.arange(start, start + num_queries, device=q.device)
        last = torch.tensor(exact.filled, device=q.device)[:, None] + steps
        is_future = torch.arange(used, device=q.device) > last[..., None]
        scores = scores.masked_fill(is_future[:, None, None], -torch.inf)
        if slots is not None:
            slot_scores = (queries @ slots.keys.transpose(2, 3)).view(*scores.shape[:4], -1)
            count = slots.counts[:, :, None, None]
            # A slot of one token is that token, and is read as such.
            is_shared = count > 1
            if temperature is not None:
                slot_scores = slot_scores * temperature.to(dtype).view(heads, -1, 1, 1).where(is_shared, 1)
            slot_scores = slot_scores + count.to(dtype).log()
            if bias is not None:
                slot_scores = slot_scores + bias.to(dtype).view(heads, -1, 1, 1).where(is_shared, 0)
            scores = torch.cat([scores, slot_scores], -1)
        probs = scores.softmax(-1)
        if observer is not None:
            observer.has_read(exact, slots, probs)
        probs = probs.flatten(2, 3)
        o = probs[..., :used] @ exact.values[:, :, :used].to(dtype)
        if slots is not None:
            o = o + probs[..., used:] @ slots.values
        outputs.append(o.view(batch, q.shape[1], num_queries, -1).to(q.dtype))
    return torch.cat(outputs, dim=2)
