"""A call of several tokens, or one that needs gradients, by the kernels."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.triton import library
from ovq.ops.call import Call, Rows
from ovq.ops.schedule import scheduled_slots
from ovq.ops.state import OVQState


def chunked(call: Call) -> tuple[Tensor, OVQState | None]:
    """Outputs `[B, T, H, V]`, and the state afterwards if the call wants it."""
    k, v, state, rows, options = call.k, call.v, call.state, call.rows, call.options
    pending = state.num_pending.tolist()
    seen = (state.num_seen + torch.tensor(rows.lengths, dtype=torch.int64)).tolist()
    chunk_size, slots = options.chunk_size, state.count.shape[2]
    for t in seen:
        if t >= chunk_size:
            merged = t // chunk_size * chunk_size
            slots = max(slots, scheduled_slots(merged, num_slots=options.num_slots, growth=options.growth))
    totals = [p + n for p, n in zip(pending, rows.lengths, strict=True)]
    width = max(1, min(chunk_size, max(totals, default=1)))
    o, key_sum, value_sum, count, _, _ = library.attention(
        call.q,
        k,
        v,
        call.scale,
        state.key_sum,
        state.value_sum,
        state.count,
        state.pending_keys,
        state.pending_values,
        state.num_seen,
        torch.tensor([rows.starts, rows.lengths], dtype=torch.int64),
        options.num_slots,
        chunk_size,
        options.growth,
        slots,
        sum(-(-n // width) * width for n in totals),
    )
    if not call.wants_state:
        return o, None
    after = dataclasses.replace(
        state,
        key_sum=key_sum,
        value_sum=value_sum,
        count=count,
        pending_keys=_tail(k, state.pending_keys, pending, rows, chunk_size),
        pending_values=_tail(v, state.pending_values, pending, rows, chunk_size),
        num_seen=torch.tensor(seen, dtype=torch.int64),
    )
    return o, after


def _tail(x: Tensor, waiting: Tensor, pending: list[int], rows: Rows, chunk_size: int) -> Tensor:
    """Pending tokens `[R, Hkv, C, D]` after a call, of those before it and the new ones `[B, T, Hkv, D]`."""
    left = [(p + n) % chunk_size for p, n in zip(pending, rows.lengths, strict=True)]
    new = [min(m, n) for m, n in zip(left, rows.lengths, strict=True)]
    ends = [s + n for s, n in zip(rows.starts, rows.lengths, strict=True)]
    aligned = AlignedRows(
        Rows(tuple(e - n for e, n in zip(ends, new, strict=True)), tuple(new)),
        pending=[m - n for m, n in zip(left, new, strict=True)],
        chunk_size=chunk_size,
        num_tokens=x.shape[0] * x.shape[1],
    )
    kept = aligned.tail(aligned.align(x, waiting[aligned.order]))
    return kept[aligned.inverse()]
