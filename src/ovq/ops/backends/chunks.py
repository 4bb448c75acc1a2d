"""`Chunks`: a call in the chunk-aligned layout, shared by the fast backends."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan
from ovq.ops.call import Call
from ovq.ops.state import OVQState, with_capacity


class Chunks:
    """A call of at least one token in the chunk-aligned layout (`AlignedRows`).

    Attributes:
        call: the call.
        plan: the work to do, chunk by chunk.
        before: the initial state, rows in sorted order, with all slots allocated that the call needs.
        k: `[num_chunks, W, Hkv, K]` all keys, including pending ones. v: likewise.
        weights: `[num_chunks, W, Hkv, 1]` weights of all tokens; None without token weights.
        fading: `[num_chunks, Hkv]` factors of the dictionaries (`with_forgetting`); None without forgetting.
    """

    def __init__(self, call: Call) -> None:
        aligned = AlignedRows(
            call.rows,
            pending=call.state.num_pending.tolist(),
            chunk_size=call.options.chunk_size,
            num_tokens=call.num_tokens,
        )
        before = call.state if aligned.is_sorted else call.state.select(aligned.order)
        self.call = call
        self.plan = Plan.make(
            aligned,
            opened=before.num_open.tolist(),
            num_merged=before.num_merged.tolist(),
            num_kv_heads=call.k.shape[2],
            group_size=call.q.shape[2] // call.k.shape[2],
            options=call.options,
        )
        self.before = before = with_capacity(before, self.plan.capacity)
        self.k = aligned.align(call.k, before.pending_keys)
        self.v = aligned.align(call.v, before.pending_values)
        self.weights: Tensor | None = None
        self.fading: Tensor | None = None
        if call.log_forget is not None:
            self.before, self.weights, self.fading = with_forgetting(call, before, self.plan)
        elif call.token_weights is not None:
            assert before.pending_weights is not None
            self.weights = aligned.align(call.token_weights[..., None], before.pending_weights[..., None])

    def inputs(self) -> tuple[Any, ...]:
        """The arguments of `ChunkAttention` (`torch/chunk.py`)."""
        q, scale = self.plan.aligned.align(self.call.q, None), self.call.scale
        return self.plan, q, self.k, self.v, scale, self.weights, *Dictionary.of(self.before).tensors

    def results(self, o: Tensor, *sums: Any) -> tuple[Tensor, OVQState | None]:
        """Outputs and final state of the call, from the results of `ChunkAttention`."""
        q = self.call.q
        o = self.plan.aligned.unalign(o, q.shape[0], q.shape[1])
        return o, self.state_after(Dictionary(*sums)) if self.call.wants_state else None

    def state_after(self, sums: Dictionary) -> OVQState:
        """Final state, rows in the order of the call, from the final dictionaries."""
        aligned = self.plan.aligned
        seen = [m + n for m, n in zip(self.plan.num_merged, aligned.lengths, strict=True)]
        after = dataclasses.replace(
            self.before,
            **vars(sums),
            pending_keys=aligned.tail(self.k),
            pending_values=aligned.tail(self.v),
            num_seen=torch.tensor(seen, dtype=torch.int64, device="cpu"),
            pending_weights=None if self.weights is None else aligned.tail(self.weights).squeeze(-1),
        )
        return after if aligned.is_sorted else after.select(aligned.inverse())


def with_forgetting(call: Call, before: OVQState, plan: Plan) -> tuple[OVQState, Tensor, Tensor]:
    """Weights for forgetting, relative to the end of a complete chunk and to the start of an incomplete one.

    This is `begun` of `fading.py`, which explains it, for all chunks at once, with bitwise equal results.

    Args:
        call: a call with `log_forget`, and so with weights.
        before: the initial state, rows in sorted order.
        plan: the plan of the call.

    Returns:
        The state `before`, but with the `pending_forget` of the final state; weights
        `[num_chunks, W, Hkv, 1]` of all tokens, including pending ones; and the factor `[num_chunks, Hkv]` of
        the slots before a chunk is read, less than 1 if the chunk is complete.
    """
    assert call.log_forget is not None
    assert call.token_weights is not None
    assert before.pending_forget is not None
    assert before.pending_weights is not None
    aligned, size, wide = plan.aligned, plan.options.chunk_size, before.pending_weights.dtype
    # Rows without tokens come last and have no chunk.
    num_rows = sum(n > 0 for n in aligned.lengths)
    device = call.log_forget.device
    first = torch.tensor(aligned.first_chunk[:num_rows], dtype=torch.int64, device=device)
    chunks = [aligned.chunks_of(r) for r in range(num_rows)]
    logs = aligned.align(call.log_forget[..., None], None)[..., 0].clone()
    # Pending tokens come before the new ones. The sum of their logs is added at the first position, and the
    # logs at their positions are 0.
    logs[first, 0] += before.pending_forget[:num_rows]
    logs = logs.cumsum(1)
    total = logs[:, -1]
    is_complete = [
        n >= (i + 1) * size for n, num in zip(aligned.lengths, chunks, strict=False) for i in range(num)
    ]
    log_fading = total * torch.tensor(is_complete, device=device)[:, None]
    fading = log_fading.exp().to(wide)
    ones, zeros = torch.ones_like(call.token_weights), torch.zeros_like(before.pending_weights)
    is_new = aligned.align(ones[..., None], zeros[..., None]) > 0
    own = aligned.align(call.token_weights[..., None], before.pending_weights[..., None])
    # Weights of pending tokens are already relative to the start of their chunk.
    own = torch.where(is_new, own * (-logs).exp().to(wide)[..., None], own)
    weights = own * fading[:, None, :, None]
    left = before.pending_forget.clone()
    last = first + torch.tensor(chunks, dtype=torch.int64, device=device) - 1
    left[:num_rows] = (total - log_fading)[last]
    return dataclasses.replace(before, pending_forget=left), weights, fading
