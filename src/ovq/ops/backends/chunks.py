"""What the fast backends share: lay a call out in chunks, run the backend's recurrence, restore the order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.frames import Frames
from ovq.ops.backends.plan import Plan
from ovq.ops.call import Call
from ovq.ops.state import OVQState, with_capacity

# Of rows in chunks: the plan, q, k, v, scale, key_sum, value_sum, count; where tokens have weights, their own
# and those of slots; where they forget too, `Frames.fading`. Returns outputs, sums and counts at the end, and
# the weights of slots, or None.
Recurrence = Callable[..., tuple[Any, ...]]


def in_chunks(call: Call, recurrence: Recurrence) -> tuple[Tensor, OVQState | None]:
    """Outputs and state of a call.

    Args:
        call: the call.
        recurrence: processes the rows in chunks, sorted by length (`torch/chunk.py` says what its arguments
            are); the `apply` of an autograd function.
    """
    q, k, v, state = call.q, call.k, call.v, call.state
    if not sum(call.rows.lengths):
        return q.new_zeros(*q.shape[:3], v.shape[3]), state
    before, plan = planned(call, group_size=call.group_size)
    aligned = plan.aligned
    chunks_k = aligned.align(k, before.pending_keys)
    chunks_v = aligned.align(v, before.pending_values)
    chunks_w: Tensor | None = None
    gates: tuple[Tensor | None, ...] = ()
    if call.log_forget is not None:
        frames = Frames.of(call, before, plan)
        before, chunks_w = frames.before, frames.weights
        gates = chunks_w, before.weight, frames.fading
    elif call.token_weights is not None:
        assert before.weight is not None
        assert before.pending_weights is not None
        chunks_w = aligned.align(call.token_weights[..., None], before.pending_weights[..., None])
        gates = chunks_w, before.weight
    o, *sums = recurrence(
        plan,
        aligned.align(q, None),
        chunks_k,
        chunks_v,
        call.scale,
        before.key_sum,
        before.value_sum,
        before.count,
        *gates,
    )
    o = aligned.unalign(o, q.shape[0], q.shape[1])
    if not call.wants_state:
        return o, None
    return o, state_after(before, Dictionary(*sums), chunks_k, chunks_v, plan, chunks_w)


def planned(call: Call, *, group_size: int) -> tuple[OVQState, Plan]:
    """The state that a call starts from, rows in sorted order and with room for all slots, and the plan.

    Args:
        call: the call.
        group_size: query heads per key/value head.
    """
    aligned = AlignedRows(
        call.rows,
        pending=call.state.num_pending.tolist(),
        chunk_size=call.options.chunk_size,
        num_tokens=call.num_tokens,
    )
    before = call.state if aligned.is_sorted else call.state.select(aligned.order)
    plan = Plan.make(
        aligned,
        opened=before.num_open.tolist(),
        num_merged=(before.num_seen - before.num_pending).tolist(),
        num_kv_heads=call.num_kv_heads,
        group_size=group_size,
        options=call.options,
    )
    return with_capacity(before, plan.capacity), plan


def state_after(
    before: OVQState,
    sums: Dictionary,
    chunks_k: Tensor,
    chunks_v: Tensor,
    plan: Plan,
    chunks_w: Tensor | None = None,
) -> OVQState:
    """The state after a call, rows in the order of the call.

    Args:
        before: the state before it, rows in sorted order.
        sums: the dictionaries at the end.
        chunks_k: all keys, chunk-aligned. chunks_v: likewise.
        plan: the plan of the call.
        chunks_w: all weights, `[..., 1]`, chunk-aligned; None without.
    """
    aligned = plan.aligned
    seen = [m + n for m, n in zip(plan.num_merged, aligned.lengths, strict=True)]
    after = dataclasses.replace(
        before,
        key_sum=sums.key_sum,
        value_sum=sums.value_sum,
        count=sums.count,
        pending_keys=aligned.tail(chunks_k),
        pending_values=aligned.tail(chunks_v),
        num_seen=torch.tensor(seen, dtype=torch.int64),
        weight=sums.weight,
        pending_weights=None if chunks_w is None else aligned.tail(chunks_w).squeeze(-1),
    )
    return after if aligned.is_sorted else after.select(aligned.inverse())
