"""What the fast backends share: lay a call out in chunks, run the backend's recurrence, restore the order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.plan import Plan
from ovq.ops.call import Call
from ovq.ops.state import OVQState, with_capacity

# For rows in chunks: q, k, v, scale, key_sum, value_sum, count, plan -> outputs, sums and counts at the end.
Recurrence = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def in_chunks(call: Call, recurrence: Recurrence) -> tuple[Tensor, OVQState | None]:
    """Outputs and state of a call.

    Args:
        call: the call.
        recurrence: processes the rows in chunks, sorted by length (`torch/chunk.py` defines its arguments).
    """
    q, k, v, state = call.q, call.k, call.v, call.state
    if not sum(call.rows.lengths):
        return q.new_zeros(*q.shape[:3], v.shape[3]), state
    aligned = AlignedRows(
        call.rows,
        pending=state.num_pending.tolist(),
        chunk_size=call.options.chunk_size,
        num_tokens=call.num_tokens,
    )
    before = state if aligned.is_sorted else state.select(aligned.order)
    num_merged = (before.num_seen - before.num_pending).tolist()
    plan = Plan.make(
        aligned,
        opened=before.num_open.tolist(),
        num_merged=num_merged,
        num_kv_heads=call.num_kv_heads,
        group_size=call.group_size,
        options=call.options,
    )
    before = with_capacity(before, plan.capacity)
    chunks_k = aligned.align(k, before.pending_keys)
    chunks_v = aligned.align(v, before.pending_values)
    o, key_sum, value_sum, count = recurrence(
        aligned.align(q, None),
        chunks_k,
        chunks_v,
        call.scale,
        before.key_sum,
        before.value_sum,
        before.count,
        plan,
    )
    o = aligned.unalign(o, q.shape[0], q.shape[1])
    if not call.wants_state:
        return o, None
    seen = [m + n for m, n in zip(num_merged, aligned.lengths, strict=True)]
    after = dataclasses.replace(
        before,
        key_sum=key_sum,
        value_sum=value_sum,
        count=count,
        pending_keys=aligned.tail(chunks_k),
        pending_values=aligned.tail(chunks_v),
        num_seen=torch.tensor(seen, dtype=torch.int64),
    )
    return o, after if aligned.is_sorted else after.select(aligned.inverse())
