"""Backward of the read from recomputed probabilities: one kernel each for queries, slots and chunk tokens.

Each kernel processes all chunks of a segment at once. Every sum is computed within one program in a fixed
order, so results are deterministic.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import (
    BEFORE,
    CHUNK,
    COLUMNS,
    IS_COMPLETE,
    LOG2E,
    TOKENS,
    dot,
    put_rows,
    rows,
    traced,
)


@triton.jit
def _to_queries(probs, grad_o, keys, values, delta, acc, rest, mean):
    """Add candidates' contribution to the gradient of queries, by that of scores: P (dP - sum(o do)).

    Args:
        rest: `[BM]` sums of the gradients of scores: not 0, as o is rounded.
        mean: `[BM, BK]` means of keys by P, if o is in 16 bits.
    """
    zeros = tl.zeros([grad_o.shape[0], values.shape[0]], tl.float32)
    grad_scores = probs * (dot(grad_o, tl.trans(values), zeros) - delta[:, None])
    if keys.dtype != tl.float32:
        mean = dot(probs, keys, mean)
    return dot(grad_scores, keys, acc), rest + tl.sum(grad_scores, 1), mean


@triton.jit(do_not_specialize=["first"])
def grad_queries(
    q, k, v, scale, table, snap_keys, snap_values, snap_bias, own_bias, o, grad_o, lse, delta, grad_q,
    grad_scale, first, W, H, G, K, V, M, QB,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries of one head; grid (chunks of the segment times blocks, query heads).

    Args:
        own_bias: as in `read`.
        delta: `[num_chunks, H, W]` receives sum(P dP) of each query.
        grad_q: `[num_chunks, W, H, K]`.
        grad_scale: `[num_chunks, QB, H]` receives each block's contribution to the gradient of the scale.
    """
    index = tl.program_id(0) // QB
    block = tl.program_id(0) % QB
    head = tl.program_id(1)
    start = block * BM
    entry = table + (first + index) * COLUMNS
    tokens = tl.load(entry + TOKENS)
    if start < tokens:
        chunk = tl.load(entry + CHUNK).to(tl.int64)
        num = tl.load(entry + BEFORE)
        H_kv = H // G
        snap_at = (index.to(tl.int64) * H_kv + head // G) * M
        t = start + tl.arange(0, BM)
        is_query = t < tokens
        factor = tl.load(scale + head)
        place = (chunk * W + t) * H + head
        queries = rows(q, place, is_query, K, BK)
        grads = rows(grad_o, place, is_query, V, BV)
        own_delta = tl.sum(rows(o, place, is_query, V, BV).to(tl.float32) * grads.to(tl.float32), 1)
        rest = tl.zeros([BM], tl.float32)
        # Positions beyond the last query get probability zero.
        total = tl.load(lse + (chunk * H + head) * W + t, mask=is_query, other=float("inf"))
        acc = tl.zeros([BM, BK], tl.float32)
        mean = tl.zeros([BM, BK], tl.float32)
        for slots in range(0, num, BN):
            slot = slots + tl.arange(0, BN)
            is_used = slot < num
            keys = rows(snap_keys, snap_at + slot, is_used, K, BK).to(queries.dtype)
            values = rows(snap_values, snap_at + slot, is_used, V, BV).to(queries.dtype)
            bias = tl.load(snap_bias + snap_at + slot, mask=is_used, other=-float("inf"))
            scores = dot(queries, tl.trans(keys), tl.zeros([BM, BN], tl.float32)) * (factor * LOG2E)
            probs = tl.exp2(scores + bias[None, :] - total[:, None])
            acc, rest, mean = _to_queries(probs, grads, keys, values, own_delta, acc, rest, mean)
        for tokens_from in range(0, tl.minimum(start + BM, tokens), BN):
            own = tokens_from + tl.arange(0, BN)
            source = (chunk * W + own) * H_kv + head // G
            keys = rows(k, source, own < tokens, K, BK)
            values = rows(v, source, own < tokens, V, BV)
            scores = dot(queries, tl.trans(keys), tl.zeros([BM, BN], tl.float32)) * (factor * LOG2E)
            if own_bias is not None:
                scores += tl.load(own_bias + source, mask=own < tokens, other=0.0)[None, :]
            scores = tl.where(own[None, :] <= t[:, None], scores, -float("inf"))
            probs = tl.exp2(scores - total[:, None])
            acc, rest, mean = _to_queries(probs, grads, keys, values, own_delta, acc, rest, mean)
        # What o lost by rounding would add up in gradients of gates and the scale, sums over many tokens.
        if o.dtype.element_ty != tl.float32:
            own_delta += rest
            acc -= rest[:, None] * mean
        tl.store(delta + (chunk * H + head) * W + t, own_delta, mask=is_query)
        part = tl.sum(tl.sum(acc * queries.to(tl.float32), 1), 0)
        tl.store(grad_scale + (chunk * QB + block) * H + head, part)
        put_rows(grad_q, place, acc * factor, is_query, K, BK)


@triton.jit
def _from_queries(
    keys, values, bias, grad_keys, grad_values, grad_bias, source, q, grad_o, scale, lse, delta, chunk, head,
    start, tokens, W, H, K, V, IS_CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Add a block of queries' contribution to the gradients of candidates `keys` `[BN, K]` and `values`.

    Args:
        source: `[BN]` positions of the candidates if they are chunk tokens (IS_CAUSAL).
        bias: `[BN]` log2 masses; -inf excludes a candidate.
        grad_bias: `[BN]` gradient of the candidates' scores, if requested (HAS_BIAS).
    """
    t = start + tl.arange(0, BM)
    is_query = t < tokens
    place = (chunk * W + t) * H + head
    queries = rows(q, place, is_query, K, BK)
    grads = rows(grad_o, place, is_query, V, BV)
    line = (chunk * H + head) * W + t
    total = tl.load(lse + line, mask=is_query, other=float("inf"))
    factor = tl.load(scale + head)
    zeros = tl.zeros([keys.shape[0], BM], tl.float32)
    scores = dot(keys, tl.trans(queries), zeros) * (factor * LOG2E) + bias[:, None]
    if IS_CAUSAL:
        scores = tl.where(source[:, None] <= t[None, :], scores, -float("inf"))
    probs = tl.exp2(scores - total[None, :])
    grad_values = dot(probs, grads, grad_values)
    inner = dot(values, tl.trans(grads), zeros) - tl.load(delta + line, mask=is_query, other=0.0)[None, :]
    if HAS_BIAS:
        grad_bias += tl.sum(probs * inner, 1)
    grad_keys = dot(probs * inner * factor, queries, grad_keys)
    return grad_keys, grad_values, grad_bias


@triton.jit(do_not_specialize=["first"])
def grad_slots(
    q, scale, table, snap_keys, snap_values, snap_bias, grad_o, lse, delta, grad_keys, grad_values,
    grad_weights, first, W, H, G, K, V, M, SB,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """A chunk's contribution to the gradients of a block of slots; grid (chunks times blocks, kv heads).

    Args:
        grad_keys: `[entries, H / G, M, K]` float32, receives the gradient of the key sums: the gradient of
            the means divided by the counts or weights. grad_values: likewise.
        grad_weights: `[entries, H / G, M]` float32, receives the gradient of slot weights, or None.
    """
    index = tl.program_id(0) // SB
    block = tl.program_id(0) % SB
    head = tl.program_id(1)
    entry = table + (first + index) * COLUMNS
    num = tl.load(entry + BEFORE)
    if block * BN < num:
        chunk = tl.load(entry + CHUNK).to(tl.int64)
        tokens = tl.load(entry + TOKENS)
        slot = block * BN + tl.arange(0, BN)
        is_used = slot < num
        snap_at = (index.to(tl.int64) * (H // G) + head) * M + slot
        keys = rows(snap_keys, snap_at, is_used, K, BK).to(q.dtype.element_ty)
        values = rows(snap_values, snap_at, is_used, V, BV).to(q.dtype.element_ty)
        bias = tl.load(snap_bias + snap_at, mask=is_used, other=-float("inf"))
        own_keys = tl.zeros([BN, BK], tl.float32)
        own_values = tl.zeros([BN, BV], tl.float32)
        own_bias = tl.zeros([BN], tl.float32)
        for g in range(0, G):
            for start in range(0, tokens, BM):
                own_keys, own_values, own_bias = _from_queries(
                    keys, values, bias, own_keys, own_values, own_bias, slot, q, grad_o, scale, lse, delta,
                    chunk, head * G + g, start, tokens, W, H, K, V, False, grad_weights is not None, BM, BK,
                    BV,
                )  # fmt: skip
        # The bias is log2 of the mass, -inf for zero mass.
        inverse = tl.exp2(-tl.where(bias > -float("inf"), bias, 0.0))
        put_rows(grad_keys, snap_at, own_keys * inverse[:, None], is_used, K, BK)
        put_rows(grad_values, snap_at, own_values * inverse[:, None], is_used, V, BV)
        if grad_weights is not None:
            # The weight of a slot enters its score and divides its sums: read again, as means not rounded.
            own_bias -= tl.sum(own_keys * rows(snap_keys, snap_at, is_used, K, BK), 1)
            own_bias -= tl.sum(own_values * rows(snap_values, snap_at, is_used, V, BV), 1)
            own_bias = tl.where(bias > -float("inf"), own_bias * inverse, 0.0)
            tl.store(grad_weights + snap_at, own_bias, mask=is_used)


@triton.jit(do_not_specialize=["first"])
def grad_tokens(
    q, k, v, scale, table, grad_o, lse, delta, deposit_keys, deposit_values, grad_k, grad_v,
    token_weights, own_bias, deposit_weights, grad_weights, first, W, H, G, K, V, TB,
    LEAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of a chunk's keys and values; grid (chunks times blocks, key/value heads).

    Args:
        deposit_keys: `[entries, H / G, W, K]` float32 gradient of the sum that each token of a complete chunk
            was added to. deposit_values: likewise.
        grad_k: `[num_chunks, W, H / G, K]`. grad_v: likewise.
        token_weights: `[num_chunks, W, H / G]`; deposit_weights: `[entries, H / G, W]` gradient of the weight
            of each token's slot; grad_weights: like token_weights. All None without token weights.
        own_bias: as in `read`.
    """
    index = tl.program_id(0) // TB
    begin = tl.program_id(0) % TB * BN
    head = tl.program_id(1)
    entry = table + (first + index) * COLUMNS
    tokens = tl.load(entry + TOKENS)
    if begin < tokens:
        chunk = tl.load(entry + CHUNK).to(tl.int64)
        own = begin + tl.arange(0, BN)
        is_token = own < tokens
        H_kv = H // G
        place = (chunk * W + own) * H_kv + head
        keys = rows(k, place, is_token, K, BK)
        values = rows(v, place, is_token, V, BV)
        was_added = own < tokens * tl.load(entry + IS_COMPLETE)
        source = (index.to(tl.int64) * H_kv + head) * W + own
        own_keys = rows(deposit_keys, source, was_added, K, BK)
        own_values = rows(deposit_values, source, was_added, V, BV)
        if token_weights is not None:
            weights = tl.load(token_weights + place, mask=is_token, other=0.0)
            of_weights = tl.load(deposit_weights + source, mask=was_added, other=0.0)
            of_weights += tl.sum(own_keys * traced(keys, weights), 1)
            of_weights += tl.sum(own_values * traced(values, weights), 1)
            own_keys *= weights[:, None]
            own_values *= weights[:, None]
        bias = tl.where(is_token, 0.0, -float("inf"))
        if own_bias is not None:
            bias = tl.load(own_bias + place, mask=is_token, other=-float("inf"))
        of_scores = tl.zeros([BN], tl.float32)
        for g in range(0, G):
            for start in range(begin // BM * BM, tokens, BM):
                own_keys, own_values, of_scores = _from_queries(
                    keys, values, bias, own_keys, own_values, of_scores, own, q, grad_o, scale, lse, delta,
                    chunk, head * G + g, start, tokens, W, H, K, V, True, own_bias is not None, BM, BK, BV,
                )  # fmt: skip
        if token_weights is not None:
            if own_bias is not None:
                # The score includes the log of the weight, unless the weight is clamped at LEAST.
                of_weights += tl.where(weights >= LEAST, of_scores * tl.exp2(-bias), 0.0)
            tl.store(grad_weights + place, of_weights, mask=is_token)
        put_rows(grad_k, place, own_keys, is_token, K, BK)
        put_rows(grad_v, place, own_values, is_token, V, BV)
