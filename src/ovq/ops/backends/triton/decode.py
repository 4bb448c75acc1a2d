"""Decode step: one token per row without gradients in one launch; the recurrence merges complete chunks.

The slots of a stream are split over several programs, and one more program reads the pending tokens. Each
writes its partial softmax sums. The program that finishes last adds them up in a fixed order, so that the
result does not depend on which program that is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ovq.ops.backends.torch.decode import merged_state
from ovq.ops.backends.triton import common
from ovq.ops.backends.triton.common import LOG2E, absorbed, divisors, put_rows, rows
from ovq.ops.backends.triton.formats import wide_rows
from ovq.ops.backends.triton.passes import merge
from ovq.ops.call import Call
from ovq.ops.options import LEAST_READ
from ovq.ops.state import OVQState, advanced

# Programs per multiprocessor: enough concurrent loads to use the full memory bandwidth.
_PROGRAMS_EACH = 4
# Maximum number of elements in the products of a tile of slots with a group's queries, held in registers.
_TILE = 8192


@triton.jit
def _absorb(scores, values, top, total, acc):
    """Online softmax step with `scores` `[GP, BN]` and `values` `[BN, BV]`, without tensor cores."""
    top, total, probs, shrink = absorbed(scores, top, total)
    return top, total, acc * shrink[:, None] + tl.sum(probs[:, :, None] * values[None, :, :], 1)


@triton.jit(do_not_specialize=["pending"])
def read_token(
    q, k, v, scale, key_sum, value_sum, mass, key_step, value_step,
    pending_keys, pending_values, token_weights, pending_weights,
    places, tops, totals, accs, arrived, o, pending, H, G, K, V, M, C, PER, SPLITS,
    IS_EVEN: tl.constexpr, LEAST: tl.constexpr, HAS_MEANS: tl.constexpr,
    GP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Attention of one query per head; grid (streams, SPLITS), the last split for the pending tokens.

    Args:
        q: `[R, H * G, K]`. k: `[R, H, K]`. v: `[R, H, V]`. scale: `[H * G]`.
        key_sum: `[R, H, M, K]`, in any format. value_sum: likewise. mass: `[R, H, M]` counts, or weights.
        key_step: `[R, H, M]` scales of int8 sums, or None. value_step: likewise.
        pending_keys: `[R, H, C, K]`; receives the new key. pending_values: likewise.
        token_weights: `[R, H]`, written to pending_weights `[R, H, C]`; None without token weights.
        places: `[R]` int32 number of pending tokens of each row before this token, if not equal (IS_EVEN).
        tops, totals: `[streams, SPLITS, GP]` scratch. accs: `[streams, SPLITS, GP, V]`.
        arrived: `[streams]` int32 counters of finished programs, zero at the start and on return.
        o: `[R, H * G, V]`.
        pending: number of pending tokens of each row, if equal (IS_EVEN).
        PER: slots per split.
        LEAST: minimum weight of tokens of the chunk when read; None if they are read without weights.
        HAS_MEANS: whether sums are means, in a narrow format with forgetting.
    """
    stream = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    head = stream % H
    g = tl.arange(0, GP)
    is_head = g < G
    factor = tl.load(scale + head * G + g, mask=is_head, other=0.0) * LOG2E
    queries = rows(q, stream * G + g, is_head, K, BK).to(tl.float32) * factor[:, None]
    top = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, BV], tl.float32)
    if split < SPLITS - 1:
        for start in range(split * PER, tl.minimum(split * PER + PER, M), BN):
            slot = start + tl.arange(0, BN)
            own_mass = tl.load(mass + stream * M + slot, mask=slot < M, other=0)
            is_used = own_mass > 0
            number = divisors(own_mass)
            divisor = number
            if HAS_MEANS:
                divisor = number * 0 + 1
            keys = wide_rows(key_sum, key_step, stream * M + slot, is_used, K, BK)
            values = wide_rows(value_sum, value_step, stream * M + slot, is_used, V, BV) / divisor[:, None]
            scores = tl.sum(queries[:, None, :] * keys[None, :, :], 2) / divisor[None, :]
            scores += tl.log2(number)[None, :]
            scores = tl.where(is_used[None, :], scores, -float("inf"))
            top, total, acc = _absorb(scores, values, top, total, acc)
    else:
        if IS_EVEN:
            num = pending
        else:
            num = tl.load(places + stream // H)
        one = tl.arange(0, 1)
        key, value = rows(k, stream + one, one == 0, K, BK), rows(v, stream + one, one == 0, V, BV)
        put_rows(pending_keys, stream * C + num + one, key, one == 0, K, BK)
        put_rows(pending_values, stream * C + num + one, value, one == 0, V, BV)
        if token_weights is not None:
            tl.store(pending_weights + stream * C + num, tl.load(token_weights + stream))
        newest = tl.sum(queries * key.to(tl.float32), 1)[:, None]
        if LEAST is not None:
            newest += tl.log2(tl.maximum(tl.load(token_weights + stream), LEAST))
        top, total, acc = _absorb(newest, value.to(tl.float32), top, total, acc)
        for start in range(0, num, BN):
            t = start + tl.arange(0, BN)
            keys = rows(pending_keys, stream * C + t, t < num, K, BK).to(tl.float32)
            values = rows(pending_values, stream * C + t, t < num, V, BV).to(tl.float32)
            scores = tl.sum(queries[:, None, :] * keys[None, :, :], 2)
            if LEAST is not None:
                weights = tl.load(pending_weights + stream * C + t, mask=t < num, other=1.0)
                scores += tl.log2(tl.maximum(weights, LEAST))[None, :]
            scores = tl.where((t < num)[None, :], scores, -float("inf"))
            top, total, acc = _absorb(scores, values, top, total, acc)
    part = (stream * SPLITS + split) * GP + g
    tl.store(tops + part, top)
    tl.store(totals + part, total)
    put_rows(accs, part, acc, is_head, V, BV)
    # All threads must store their results before one of them counts this program as finished.
    tl.debug_barrier()
    if tl.atomic_add(arrived + stream, 1, sem="acq_rel") == SPLITS - 1:
        top = tl.full([GP], -float("inf"), tl.float32)
        total = tl.zeros([GP], tl.float32)
        acc = tl.zeros([GP, BV], tl.float32)
        for other in range(0, SPLITS):
            part = (stream * SPLITS + other) * GP + g
            own = tl.load(tops + part, cache_modifier=".cg")
            highest = tl.maximum(top, own)
            base = tl.where(highest == -float("inf"), 0.0, highest)
            shrink, weight = tl.exp2(top - base), tl.exp2(own - base)
            total = total * shrink + tl.load(totals + part, cache_modifier=".cg") * weight
            d = tl.arange(0, BV)
            place = accs + part[:, None] * V + d[None, :]
            mask = is_head[:, None] & (d < V)[None, :]
            own_acc = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
            acc = acc * shrink[:, None] + own_acc * weight[:, None]
            top = highest
        put_rows(o, stream * G + g, acc / total[:, None], is_head, V, BV)
        tl.store(arrived + stream, 0)


def decode_step(call: Call) -> tuple[Tensor, OVQState]:
    """Outputs `[B, 1, H, V]` for one new token per row, and the state after it."""
    state, options, q, k, v = call.state, call.options, call.q, call.k, call.v
    pending, after = state.num_pending.tolist(), advanced(state)
    # The kernel writes to these in place.
    buffers = (after.pending_keys, after.pending_values, call.token_weights, after.pending_weights)
    assert after.pending_keys.is_contiguous()
    assert after.pending_values.is_contiguous()
    batch, _, num_heads, dim = q.shape
    num_kv_heads, value_dim, slots = k.shape[2], v.shape[3], state.count.shape[2]
    streams, group = batch * num_kv_heads, num_heads // num_kv_heads
    group_block = triton.next_power_of_2(group)
    widest = max(common.padded(dim), common.padded(value_dim))
    block = max(1, min(64, _TILE // (group_block * widest)))
    splits = 0
    if slots:
        most = common.programs(q.device, _PROGRAMS_EACH) // streams
        splits = max(1, min(triton.cdiv(slots, block), most))
    per = triton.cdiv(triton.cdiv(slots, block), max(1, splits)) * block
    splits += 1
    tops = torch.empty(2, streams * splits * group_block, dtype=torch.float32, device=q.device)
    accs = tops.new_empty(streams * splits * group_block * value_dim)
    o = torch.empty(batch, 1, num_heads, value_dim, dtype=q.dtype, device=q.device)
    is_even = len(set(pending)) == 1
    places = torch.tensor([] if is_even else pending, dtype=torch.int32).to(q.device)
    sums = (state.key_sum, state.value_sum, state.mass)
    steps = (None if x is None else x.contiguous() for x in (state.key_step, state.value_step))
    # Triton launches on the current device, even if the tensors are on another.
    with torch.cuda.device_of(q):
        read_token[(streams, splits)](
            *(x.contiguous() for x in (q, k, v, call.scale, *sums)), *steps,
            *(x if x is None else x.contiguous() for x in buffers), places, tops[0], tops[1], accs,
            _arrived(q.device, streams), o, pending[0],
            num_kv_heads, group, dim, value_dim, slots, options.chunk_size, per, splits,
            IS_EVEN=is_even, LEAST=LEAST_READ if options.weighs_chunk else None,
            HAS_MEANS=options.weighs_chunk and state.state_dtype != "float32", GP=group_block, BN=block,
            BK=common.padded(dim), BV=common.padded(value_dim), **common.FUSED,
        )  # fmt: skip
        complete = [r for r, p in enumerate(pending) if p + 1 == options.chunk_size]
        return o, merged_state(after, complete, options, merge)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def _arrived(device: torch.device, num: int) -> Tensor:
    """Counters that are zero between launches, one set per CUDA stream, as CUDA streams overlap."""
    cuda_stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counters = _counters.get((device, cuda_stream))
    if counters is None or len(counters) < num:
        counters = torch.zeros(triton.next_power_of_2(num), dtype=torch.int32, device=device)
        _counters[device, cuda_stream] = counters
    return counters
