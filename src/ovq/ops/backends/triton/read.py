"""The read kernel: softmax attention over [dictionary | own chunk], for all chunks of a segment at once."""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import (
    BEFORE,
    CHUNK,
    COLUMNS,
    LOG2E,
    TOKENS,
    absorbed,
    dot,
    put_rows,
    rows,
)


@triton.jit
def _absorb(scores, values, top, total, acc):
    """Online softmax step with `scores` `[BM, BN]` of candidates (-inf for zero mass) and their `values`."""
    top, total, probs, shrink = absorbed(scores, top, total)
    return top, total, dot(probs, values, acc * shrink[:, None])


@triton.jit(do_not_specialize=["first"])
def read(
    q, k, v, scale, table, snap_keys, snap_values, snap_bias, own_bias, o, lse, first, W, H, G, K, V, M, QB,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Outputs of a block of queries of one head; grid (chunks of the segment times blocks, query heads).

    Args:
        q: `[num_chunks, W, H, K]`. k: `[num_chunks, W, H / G, K]`. v: likewise. scale: `[H]`.
        snap_keys: `[entries, H / G, M, K]` means before each chunk. snap_values, snap_bias: likewise.
        own_bias: `[num_chunks, W, H / G]` log2 weights of the tokens; None if they are read without weights.
        o: `[num_chunks, W, H, V]` receives the outputs.
        lse: `[num_chunks, H, W]` receives each query's log2-sum-exp2 of the scores.
        first: first entry of the segment.
    """
    index = tl.program_id(0) // QB
    start = tl.program_id(0) % QB * BM
    head = tl.program_id(1)
    entry = table + (first + index) * COLUMNS
    tokens = tl.load(entry + TOKENS)
    if start < tokens:
        chunk = tl.load(entry + CHUNK).to(tl.int64)
        num = tl.load(entry + BEFORE)
        H_kv = H // G
        snap_at = (index.to(tl.int64) * H_kv + head // G) * M
        t = start + tl.arange(0, BM)
        is_query = t < tokens
        factor = tl.load(scale + head) * LOG2E
        place = (chunk * W + t) * H + head
        queries = rows(q, place, is_query, K, BK)
        top = tl.full([BM], -float("inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BV], tl.float32)
        for slots in range(0, num, BN):
            slot = slots + tl.arange(0, BN)
            is_used = slot < num
            keys = rows(snap_keys, snap_at + slot, is_used, K, BK)
            bias = tl.load(snap_bias + snap_at + slot, mask=is_used, other=-float("inf"))
            scores = dot(queries, tl.trans(keys), tl.zeros([BM, BN], tl.float32)) * factor + bias[None, :]
            values = rows(snap_values, snap_at + slot, is_used, V, BV)
            top, total, acc = _absorb(scores, values, top, total, acc)
        # First token with a non-finite value in each component; W if there is none.
        first_non_finite = tl.zeros([BV], tl.int32) + W
        for tokens_from in range(0, tl.minimum(start + BM, tokens), BN):
            own = tokens_from + tl.arange(0, BN)
            source = (chunk * W + own) * H_kv + head // G
            keys = rows(k, source, own < tokens, K, BK)
            scores = dot(queries, tl.trans(keys), tl.zeros([BM, BN], tl.float32)) * factor
            if own_bias is not None:
                scores += tl.load(own_bias + source, mask=own < tokens, other=0.0)[None, :]
            scores = tl.where(own[None, :] <= t[:, None], scores, -float("inf"))
            values = rows(v, source, own < tokens, V, BV)
            # 0 times NaN is NaN, so non-finite values are removed here; the outputs of their own and later
            # tokens become NaN below.
            is_non_finite = (tl.abs(values.to(tl.float32)) < float("inf")) == 0
            first_non_finite = tl.minimum(
                first_non_finite, tl.min(tl.where(is_non_finite, own[:, None], W), 0)
            )
            values = tl.where(is_non_finite, 0.0, values).to(v.dtype.element_ty)
            top, total, acc = _absorb(scores, values, top, total, acc)
        acc = tl.where(t[:, None] >= first_non_finite[None, :], float("nan"), acc)
        put_rows(o, place, acc / total[:, None], is_query, V, BV)
        tl.store(lse + (chunk * H + head) * W + t, top + tl.log2(total), mask=is_query)
