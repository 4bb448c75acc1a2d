"""Attention over the memory of a head in plain PyTorch: one softmax over exact tokens and slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ovq.ops import OVQState

# Queries read at a time, which bounds the memory for their scores.
_QUERIES = 256


class Observer(Protocol):
    """Is told what a memory reads, and which slots its tokens go to."""

    def on_attend(self, state: OVQState, num_slots: int, probs: Tensor) -> None:
        """Called after the next block of n queries has attended to the first P exact tokens and N slots.

        `probs` `[B, h, G, n, P + N]` are their attention weights; N is `num_slots`.
        """

    def on_merge(self, homes: Tensor | None) -> None:
        """Called after the oldest tokens after the sinks were merged.

        `homes` `[R, h, N + C]` are the slots that the N old slots and these C tokens went to; None if the
        tokens were dropped.
        """


def read(
    q: Tensor,
    state: OVQState,
    filled: Sequence[int],
    num_slots: int,
    *,
    temperature: Tensor | None,
    bias: Tensor | None,
    observer: Observer | None = None,
) -> Tensor:
    """Attention outputs `[B, h * G, n, V]` of queries, computed in float32 or better.

    Args:
        q: `[B, h * G, n, K]` scaled queries of consecutive tokens.
        state: has their own keys and values, too.
        filled: per row, number of exact tokens before its first query.
        num_slots: slots in use, in the row that has most.
        temperature: `[h * G]`, see `HeadMemory.attend`. bias: `[h * G]`.
        observer: is told the attention weights.
    """
    batch, heads, outputs, dtype = len(q), state.count.shape[1], [], state.wide
    exact_keys, exact_values = state.pending_keys, state.pending_values
    if num_slots:
        keys, values, count = (x[:, :, :num_slots] for x in (state.keys, state.values, state.count))
    for start, block in zip(range(0, q.shape[2], _QUERIES), q.split(_QUERIES, dim=2), strict=True):
        num_queries = block.shape[2]
        used = min(max(filled) + start + num_queries, exact_keys.shape[2])
        queries = block.to(dtype).reshape(batch, heads, -1, q.shape[3])
        # [B, h, G, n, places]
        scores = queries @ exact_keys[:, :, :used].to(dtype).transpose(2, 3)
        scores = scores.unflatten(2, (-1, num_queries))
        steps = torch.arange(start, start + num_queries, device=q.device)
        last = torch.tensor(filled, device=q.device)[:, None] + steps
        is_future = torch.arange(used, device=q.device) > last[..., None]
        scores = scores.masked_fill(is_future[:, None, None], -torch.inf)
        if num_slots:
            slot_scores = (queries @ keys.transpose(2, 3)).view(*scores.shape[:4], -1)
            # A slot with one token is that token, so its score is left as it is.
            is_shared = count[:, :, None, None] > 1
            if temperature is not None:
                slot_scores = slot_scores * temperature.to(dtype).view(heads, -1, 1, 1).where(is_shared, 1)
            slot_scores = slot_scores + count[:, :, None, None].to(dtype).log()
            if bias is not None:
                slot_scores = slot_scores + bias.to(dtype).view(heads, -1, 1, 1).where(is_shared, 0)
            scores = torch.cat([scores, slot_scores], -1)
        probs = scores.softmax(-1)
        if observer is not None:
            observer.on_attend(state, num_slots, probs)
        probs = probs.flatten(2, 3)
        o = probs[..., :used] @ exact_values[:, :, :used].to(dtype)
        if num_slots:
            o = o + probs[..., used:] @ values
        outputs.append(o.view(batch, q.shape[1], num_queries, -1).to(q.dtype))
    return torch.cat(outputs, dim=2)
