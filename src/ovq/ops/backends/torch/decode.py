"""Decode step: one token per row without gradients, without copying the dictionary or the pending tokens.

The new key and value are written to pending buffers shared by the states of a chain of steps (`advanced`);
the initial state never reads that position. These states also share dictionaries, until a complete chunk is
merged into new ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary, dense_copy
from ovq.ops.backends.learned import Merging
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.torch.learn import learn
from ovq.ops.call import Call
from ovq.ops.options import Options
from ovq.ops.state import OVQState, advanced, slots_of, with_capacity
from ovq.ops.sums import divisor, log_mass, log_token_weights


def decode_step(call: Call) -> tuple[Tensor, OVQState]:
    """Outputs `[B, 1, H, V]` for one new token per row, and the state after it."""
    state, options = call.state, call.options
    pending = state.num_pending.tolist()
    after = advanced(state)
    _write(after, call, pending)
    o = _read(call, after, pending)
    complete = [r for r, p in enumerate(pending) if p + 1 == options.chunk_size]
    return o, merged_state(after, complete, options, learn)


def _write(state: OVQState, call: Call, pending: list[int]) -> None:
    """Write the new token of each row to position `pending[r]` of the pending buffers, in place."""
    buffers = (state.pending_keys, state.pending_values, state.pending_weights)
    for buffer, x in zip(buffers, (call.k, call.v, call.token_weights), strict=True):
        if buffer is None or x is None:
            continue
        if len(set(pending)) == 1:
            buffer[:, :, pending[0]] = x[:, 0]
        else:
            row = torch.arange(len(pending), device=buffer.device)
            buffer[row, :, torch.tensor(pending, device=buffer.device)] = x[:, 0]


def _read(call: Call, state: OVQState, pending: list[int]) -> Tensor:
    """Softmax attention of one query per head over [pending | dictionary], from the sums: q.D = q.S / c.

    `state` holds the new token of each row at position `pending[r]`.
    """
    q, scale, options = call.q, call.scale, call.options
    keys, values = state.pending_keys, state.pending_values
    batch, _, num_heads, dim = q.shape
    num_kv_heads, wide = keys.shape[1], state.key_sum.dtype
    used = max(pending) + 1
    queries = (q[:, 0].to(wide) * scale[:, None]).reshape(batch * num_kv_heads, -1, dim)

    def streams(x: Tensor) -> Tensor:
        return x.to(wide).reshape(batch * num_kv_heads, *x.shape[2:])

    recent_keys, recent_values = streams(keys[:, :, :used]), streams(values[:, :, :used])
    scores = torch.bmm(queries, recent_keys.transpose(1, 2))
    if options.weighs_chunk:
        assert state.pending_weights is not None
        scores += streams(log_token_weights(state.pending_weights[:, :, :used]))[:, None]
    has_norm = options.ablation.bias == "count+norm"
    if has_norm:
        half_scales = scale.view(num_kv_heads, -1, 1).repeat(batch, 1, 1) / 2
        scores -= half_scales * recent_keys.square().sum(-1)[:, None]
    if len(set(pending)) > 1:
        ends = torch.tensor(pending, device=q.device).repeat_interleave(num_kv_heads)
        future = torch.arange(used, device=q.device) > ends[:, None]
        scores.masked_fill_(future[:, None], -torch.inf)
        # Another continuation may have written NaN there, and 0 times NaN is NaN.
        recent_values = recent_values.masked_fill(future[..., None], 0)
    if not state.count.shape[2]:
        o = torch.bmm(scores.softmax(-1), recent_values)
    else:
        mass = streams(state.mass)[:, None]
        if state.weight is None:
            # Equivalent to the other branch with fewer operations, which dominate the time of a decode step.
            counts, log_counts = mass.clamp(min=1), mass.log()
        else:
            counts, log_counts = divisor(mass, wide), log_mass(mass, wide)
        slot_scores = torch.bmm(queries, streams(state.key_sum).transpose(1, 2))
        slot_scores.div_(counts).add_(log_counts)
        if has_norm:
            slot_scores -= half_scales * streams(state.keys).square().sum(-1)[:, None]
        probs = torch.cat([scores, slot_scores], -1).softmax(-1)
        # P D_v = (P / c) S_v: dividing the probabilities is cheaper than dividing the sums.
        slot_probs = probs[..., used:] / counts
        o = torch.baddbmm(torch.bmm(probs[..., :used], recent_values), slot_probs, streams(state.value_sum))
    return o.view(batch, 1, num_heads, -1).to(q.dtype)


def merged_state(
    state: OVQState, complete: list[int], options: Options, merge: Callable[[Merging], object]
) -> OVQState:
    """`state` with the complete chunks of the rows `complete` merged into copies of their dictionaries."""
    if not complete:
        return state
    # Rows often complete their chunks together; no selection is needed then.
    is_all = len(complete) == state.batch_size
    rows = state if is_all else state.select(complete)
    plan = Plan.of_chunks(
        opened=rows.num_open.tolist(),
        num_merged=[n - options.chunk_size for n in rows.num_seen.tolist()],
        num_kv_heads=rows.count.shape[1],
        options=options,
    )
    given, state = state, with_capacity(state, plan.capacity)
    rows = state if is_all else with_capacity(rows, state.count.shape[2])
    # Copies, as merging is in place; selected rows and rows with added capacity are copies already.
    wide = rows.to_state_dtype("float32")
    sums = Dictionary.of(wide).map(dense_copy if rows is given else Tensor.contiguous)
    keys, values, weights = rows.pending_keys, rows.pending_values, rows.pending_weights
    of_tokens = None if weights is None else weights.transpose(1, 2)[..., None]
    merge(Merging(keys.transpose(1, 2), values.transpose(1, 2), sums, plan, of_tokens))
    merged = dataclasses.replace(wide, **vars(sums)).to_state_dtype(state.state_dtype)
    if is_all:
        return merged
    # New tensors, as the old ones belong to earlier states.
    index = torch.tensor(complete, device=state.count.device)
    changed: dict[str, Any] = {
        name: getattr(state, name).index_copy(0, index, x) for name, x in slots_of(merged).items()
    }
    return dataclasses.replace(state, **changed)
