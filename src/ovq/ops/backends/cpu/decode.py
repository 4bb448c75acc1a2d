"""Decode steps, one token per row: one call of a kernel, and another when a chunk is complete."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.kernels import DTYPES, dense, learn
from ovq.ops.backends.cpu.mirrors import mirror_of
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
    shape = q.shape
    o = torch.empty((*shape[:3], v.shape[3]), dtype=q.dtype)
    call, _kept = slots_to_read(after, state.num_seen, num_heads=shape[2])
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        q, k, v = dense(q), dense(k), dense(v)
        call.q_row, call.k_row, call.v_row = (x.stride(0) for x in (q, k, v))
        call.q_head, call.k_head, call.v_head = (x.stride(2) for x in (q, k, v))
    scale = scale.contiguous()
    call.q, call.k, call.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
    call.o, call.scale = o.data_ptr(), scale.data_ptr()
    if token_weights is not None:
        token_weights = token_weights.contiguous()
        call.token_weights = token_weights.data_ptr()
    call.weighs_chunk = options.weighs_chunk
    build.load().ovq_decode(ctypes.byref(call))
    return o, with_merged_chunks(after, completed(after), options)


def slots_to_read(after: OVQState, num_seen: Tensor, *, num_heads: int) -> tuple[Decode, list[Tensor]]:
    """A state as a kernel reads it, without queries and the new token; keep the tensors while it does.

    Args:
        after: the state, with room for the new token (`advanced`).
        num_seen: `[B]` tokens before the new one.
        num_heads: query heads.
    """
    buffers = after._buffers
    assert buffers is not None, "`advanced` makes them"
    prepared = buffers.prepared
    if prepared is None or not prepared.is_of(after, num_heads):
        buffers.prepared = prepared = _Prepared(after, num_heads)
    call = Decode.from_buffer_copy(prepared.call)
    num_seen = num_seen.contiguous()
    call.num_seen, call.num_threads = num_seen.data_ptr(), torch.get_num_threads()
    return call, [*prepared.kept, num_seen]


class _Prepared:
    """What the kernel is told of a dictionary and of pending buffers, which stay where they are for many
    steps.

    Queries, keys and values are taken for contiguous.
    """

    def __init__(self, after: OVQState, num_heads: int) -> None:
        self.sums = after.key_sum, after.value_sum, after.count, after.weight
        self.kept = [x.contiguous() for x in self.sums if x is not None]
        rows, num_kv_heads, capacity, key_dim = after.key_sum.shape
        value_dim = after.value_sum.shape[3]
        self.call = call = Decode(
            rows,
            num_kv_heads,
            num_heads // num_kv_heads,
            after.chunk_size,
            capacity,
            key_dim,
            value_dim,
            1,
            DTYPES.index(after.pending_keys.dtype),
        )
        call.q_row, call.k_row, call.v_row = (
            num * dim
            for num, dim in ((num_heads, key_dim), (num_kv_heads, key_dim), (num_kv_heads, value_dim))
        )
        call.q_head, call.k_head, call.v_head = key_dim, key_dim, value_dim
        call.pending_keys = after.pending_keys.data_ptr()
        call.pending_values = after.pending_values.data_ptr()
        call.key_sum, call.value_sum, call.count = (x.data_ptr() for x in self.kept[:3])
        if after.weight is not None and after.pending_weights is not None:
            call.weight, call.pending_weights = self.kept[3].data_ptr(), after.pending_weights.data_ptr()

    def is_of(self, after: OVQState, num_heads: int) -> bool:
        """Whether it says what is to be said of a state."""
        key_sum, value_sum, count, weight = self.sums
        if after.key_sum is not key_sum or after.value_sum is not value_sum or after.count is not count:
            return False
        call = self.call
        return after.weight is weight and call.group_size * call.num_kv_heads == num_heads


def completed(after: OVQState) -> list[int]:
    """The rows whose chunk the new token of an `advanced` state completes."""
    assert after._buffers is not None, "`advanced` makes them"
    size = after.chunk_size
    return [r for r, num in enumerate(after._buffers.written) if num == size]


def with_merged_chunks(after: OVQState, rows: list[int], options: Options) -> OVQState:
    """The state with the complete chunks of `rows` merged."""
    return merged_state(after, rows, options, learn_chunk) if rows else after


@mirror_of("Decode")
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
