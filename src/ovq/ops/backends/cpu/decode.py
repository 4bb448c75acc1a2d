"""Decode steps, one token per row: one call of a kernel, and another when a chunk is complete."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.kernels import DTYPES, dense, learn
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.torch.decode import merged_state
from ovq.ops.call import Call, Rows
from ovq.ops.next_step import NextStep
from ovq.ops.options import Options
from ovq.ops.state import OVQState, advanced


def decode_step(call: Call) -> tuple[Tensor, OVQState]:
    """Outputs `[B, 1, H, V]` for one new token per row, and the state after it.

    The next step of the same kind begins at `_step`.
    """
    tensors = (call.q, call.k, call.v, call.scale, call.state, call.token_weights)
    o, after = _step(*tensors, options=call.options)
    if after._next is None:
        shapes = call.q.shape, call.k.shape, call.v.shape
        sums = after.key_sum, after.value_sum, after.count, after.weight
        after._next = NextStep(_step, call.options, shapes, call.q.dtype, sums, call.scale)
    return o, after


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    state: OVQState,
    token_weights: Tensor | None,
    *,
    options: Options,
) -> tuple[Tensor, OVQState]:
    """`decode_step` of checked tensors.

    The kernel puts the new token into the pending buffers, and reads these and the sums where they lie.
    """
    after = advanced(state)
    q, k, v, scale = dense(q), dense(k), dense(v), scale.contiguous()
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    call, _kept = slots_to_read(after, state.num_seen, num_heads=q.shape[2])
    call.q, call.k, call.v, call.o, call.scale = (x.data_ptr() for x in (q, k, v, o, scale))
    call.q_row, call.k_row, call.v_row = (x.stride(0) for x in (q, k, v))
    call.q_head, call.k_head, call.v_head = (x.stride(2) for x in (q, k, v))
    if token_weights is not None:
        token_weights = token_weights.contiguous()
        call.token_weights = token_weights.data_ptr()
    call.weighs_chunk = options.weighs_chunk
    build.load().ovq_decode(ctypes.byref(call))
    return o, with_merged_chunks(after, completed(state, options), options)


def slots_to_read(after: OVQState, num_seen: Tensor, *, num_heads: int) -> tuple[Decode, list[Tensor]]:
    """A state as a kernel reads it, without queries and the new token; keep the tensors while it does.

    Args:
        after: the state, with room for the new token (`advanced`).
        num_seen: `[B]` tokens before the new one.
        num_heads: query heads.
    """
    tensors = [x.contiguous() for x in (after.key_sum, after.value_sum, after.count, num_seen)]
    rows, num_kv_heads, capacity, key_dim = after.key_sum.shape
    call = Decode(
        rows,
        num_kv_heads,
        num_heads // num_kv_heads,
        after.chunk_size,
        capacity,
        key_dim,
        after.value_sum.shape[3],
        torch.get_num_threads(),
        DTYPES.index(after.pending_keys.dtype),
    )
    call.pending_keys, call.pending_values = after.pending_keys.data_ptr(), after.pending_values.data_ptr()
    call.key_sum, call.value_sum, call.count, call.num_seen = (x.data_ptr() for x in tensors)
    if after.weight is not None and after.pending_weights is not None:
        tensors.append(after.weight.contiguous())
        call.weight, call.pending_weights = tensors[-1].data_ptr(), after.pending_weights.data_ptr()
    return call, tensors


def completed(state: OVQState, options: Options) -> list[int]:
    """The rows of which one more token completes a chunk."""
    size = options.chunk_size
    return [r for r, seen in enumerate(state.num_seen.tolist()) if seen % size == size - 1]


def with_merged_chunks(after: OVQState, rows: list[int], options: Options) -> OVQState:
    """The state with the complete chunks of `rows` merged."""
    return merged_state(after, rows, options, learn_chunk) if rows else after


class Decode(ctypes.Structure):
    """`Decode` of decode.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_rows", "num_kv_heads", "group_size", "chunk_size")),
        *((name, ctypes.c_int64) for name in ("capacity", "key_dim", "value_dim", "num_threads", "dtype")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "o", "pending_keys", "pending_values")),
        *((name, ctypes.c_void_p) for name in ("scale", "key_sum", "value_sum", "count", "num_seen")),
        ("first_read", ctypes.c_void_p),
        *((f"{name}_{of}", ctypes.c_int64) for name in ("q", "k", "v") for of in ("row", "head")),
        *((name, ctypes.c_void_p) for name in ("token_weights", "weight", "pending_weights")),
        ("weighs_chunk", ctypes.c_int64),
    ]


def learn_chunk(rows: OVQState, before: list[int], after: list[int], options: Options) -> Dictionary:
    """The compiled version of the `torch` backend's `learn_chunk`, which may also work in place."""
    size, num = options.chunk_size, len(before)
    one_chunk_each = Rows(tuple(range(0, num * size, size)), (size,) * num)
    aligned = AlignedRows(one_chunk_each, pending=[0] * num, chunk_size=size, num_tokens=num * size)
    plan = Plan(
        aligned=aligned,
        slots=[list(sizes) for sizes in zip(before, after, strict=True)],
        num_merged=[t - size for t in rows.num_seen.tolist()],
        num_kv_heads=rows.count.shape[1],
        group_size=0,
        options=options,
    )
    sums = Dictionary(rows.key_sum, rows.value_sum, rows.count, rows.weight).map(Tensor.contiguous)
    weights = rows.pending_weights
    weights = None if weights is None else weights.transpose(1, 2).contiguous()
    learn(rows.pending_keys.transpose(1, 2), rows.pending_values.transpose(1, 2), sums, plan, weights)
    return sums.map(lambda x: x.flatten(0, 1))
