"""Attention over the memory of a head in plain PyTorch: one softmax over exact tokens and slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ovq.ops.sums import state_dtype

# Queries read at a time, which bounds the memory for their scores.
_QUERIES = 256


class Exact(NamedTuple):
    """Keys and values `[B, h, P, D]` of exact tokens in order, including those of the queries.

    `filled` is, per row, the number of exact tokens before its first query.
    """

    keys: Tensor
    values: Tensor
    filled: Sequence[int]


class Slots(NamedTuple):
    """Slots in use: means `[B, h, N, D]`, and token counts `[B, h, N]`, 0 for slots that a row lacks."""

    keys: Tensor
    values: Tensor
    counts: Tensor


class Observer(Protocol):
    """Is told what a memory reads, and which slots its tokens go to."""

    def on_attend(self, exact: Exact, slots: Slots | None, probs: Tensor) -> None:
        """Called after the next block of n queries has attended to the first P exact tokens and N slots.

        `probs` `[B, h, G, n, P + N]` are their attention weights.
        """

    def on_merge(self, homes: Tensor | None) -> None:
        """Called after the oldest tokens after the sinks were merged.

        `homes` `[R, h, N + C]` are the slots that the N old slots and these C tokens went to; None if the
        tokens were dropped.
        """


def read(
    q: Tensor,
    exact: Exact,
    slots: Slots | None,
    *,
    temperature: Tensor | None,
    bias: Tensor | None,
    observer: Observer | None = None,
) -> Tensor:
    """Attention outputs `[B, h * G, n, V]` of scaled queries `[B, h * G, n, K]` of consecutive tokens.

    Computed in float32 or better. `temperature` and `bias` `[h * G]` are as in `HeadMemory.attend`.
    """
    batch, heads, outputs = len(q), exact.keys.shape[1], []
    dtype = state_dtype(exact.keys.dtype)
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
            # A slot with one token is that token, so its score is left as it is.
            is_shared = count > 1
            if temperature is not None:
                slot_scores = slot_scores * temperature.to(dtype).view(heads, -1, 1, 1).where(is_shared, 1)
            slot_scores = slot_scores + count.to(dtype).log()
            if bias is not None:
                slot_scores = slot_scores + bias.to(dtype).view(heads, -1, 1, 1).where(is_shared, 0)
            scores = torch.cat([scores, slot_scores], -1)
        probs = scores.softmax(-1)
        if observer is not None:
            observer.on_attend(exact, slots, probs)
        probs = probs.flatten(2, 3)
        o = probs[..., :used] @ exact.values[:, :, :used].to(dtype)
        if slots is not None:
            o = o + probs[..., used:] @ slots.values
        outputs.append(o.view(batch, q.shape[1], num_queries, -1).to(q.dtype))
    return torch.cat(outputs, dim=2)
