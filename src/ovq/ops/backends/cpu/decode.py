"""Decode steps, one token per row: one call of a kernel, and another when a chunk is complete."""

from __future__ import annotations

import ctypes
from functools import partial

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
        after._next = NextStep(partial(_step, options=call.options), shapes, call.q.dtype, sums, call.scale)
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
    q, k, v = dense(q), dense(k), dense(v)
    o = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    tensors = [x.contiguous() for x in (scale, after.key_sum, after.value_sum, after.count, state.num_seen)]
    rows, _, num_heads, key_dim = q.shape
    num_kv_heads = k.shape[2]
    call = _Decode(
        rows,
        num_kv_heads,
        num_heads // num_kv_heads,
        options.chunk_size,
        after.count.shape[2],
        key_dim,
        v.shape[3],
        torch.get_num_threads(),
        DTYPES.index(q.dtype),
        *(x.data_ptr() for x in (q, k, v, o, after.pending_keys, after.pending_values)),
        *(x.data_ptr() for x in tensors),
        *(x.stride(i) for x in (q, k, v) for i in (0, 2)),
    )
    if token_weights is not None:
        assert after.weight is not None
        assert after.pending_weights is not None
        weights = (token_weights.contiguous(), after.weight.contiguous(), after.pending_weights)
        call.token_weights, call.weight, call.pending_weights = (x.data_ptr() for x in weights)
    build.load().ovq_decode(ctypes.byref(call))
    size = options.chunk_size
    complete = [r for r, seen in enumerate(state.num_seen.tolist()) if seen % size == size - 1]
    return o, merged_state(after, complete, options, learn_chunk) if complete else after


class _Decode(ctypes.Structure):
    """`Decode` of decode.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_rows", "num_kv_heads", "group_size", "chunk_size")),
        *((name, ctypes.c_int64) for name in ("capacity", "key_dim", "value_dim", "num_threads", "dtype")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "o", "pending_keys", "pending_values")),
        *((name, ctypes.c_void_p) for name in ("scale", "key_sum", "value_sum", "count", "num_seen")),
        *((f"{name}_{of}", ctypes.c_int64) for name in ("q", "k", "v") for of in ("row", "head")),
        *((name, ctypes.c_void_p) for name in ("token_weights", "weight", "pending_weights")),
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
