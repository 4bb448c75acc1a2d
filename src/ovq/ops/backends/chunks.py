"""What the fast backends share: `Chunks`, a call laid out in chunks, and what becomes of it afterwards."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.frames import with_frames
from ovq.ops.backends.plan import Plan
from ovq.ops.call import Call
from ovq.ops.state import OVQState, with_capacity


class Chunks:
    """A call of at least one token, laid out in chunks: rows sorted by length, each from a chunk on.

    Attributes:
        call: the call.
        plan: what is done, chunk by chunk.
        before: the state that the call starts from, rows in sorted order and with room for all slots.
        k: `[num_chunks, W, Hkv, K]` all keys, pending ones among them. v: likewise.
        weights: `[num_chunks, W, Hkv, 1]` of all tokens; None where tokens have no weights.
        fading: `[num_chunks, Hkv]` by how much dictionaries fade (`frames.py`); None where nothing is
            forgotten.
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
            num_merged=(before.num_seen - before.num_pending).tolist(),
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
            self.before, self.weights, self.fading = with_frames(call, before, self.plan)
        elif call.token_weights is not None:
            assert before.pending_weights is not None
            self.weights = aligned.align(call.token_weights[..., None], before.pending_weights[..., None])

    def inputs(self) -> tuple[Any, ...]:
        """The arguments of `ChunkAttention` (`torch/chunk.py`)."""
        q, scale = self.plan.aligned.align(self.call.q, None), self.call.scale
        return self.plan, q, self.k, self.v, scale, self.weights, *Dictionary.of(self.before).tensors

    def results(self, o: Tensor, *sums: Any) -> tuple[Tensor, OVQState | None]:
        """Outputs and state of the call, from what `ChunkAttention` returns."""
        q = self.call.q
        o = self.plan.aligned.unalign(o, q.shape[0], q.shape[1])
        return o, self.state_after(Dictionary(*sums)) if self.call.wants_state else None

    def state_after(self, sums: Dictionary) -> OVQState:
        """The state after the call, rows in the order of the call, from the dictionaries at its end."""
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
