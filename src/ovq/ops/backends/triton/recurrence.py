"""The recurrence over chunks: merge a chunk, write the dictionary for the read, score the next chunk's keys.

A program owns a block of slots of one stream (a key/value head of a row). It adds the tokens of the previous
chunk, writes the means that the queries of the next chunk will read, and scores the keys of that chunk
against them. `route.py` then decides what depends on all slots of a stream, such as the nearest slot.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import (
    AFTER,
    BEFORE,
    CHUNK,
    COLUMNS,
    IS_COMPLETE,
    TINY,
    TOKENS,
    are_extreme,
    dot,
    log2_mass,
    means,
    opener,
    place_of,
    put_rows,
    rows,
)
from ovq.ops.backends.triton.formats import in_format


@triton.jit
def add_tokens(sums, counts, slot, x, slots, place, stride, C, D, SIGN: tl.constexpr, TB: tl.constexpr,
               BD: tl.constexpr, numbers=None, token_weights=None):  # fmt: skip
    """Add (SIGN 1) or subtract (SIGN -1) a chunk's tokens in order of position, slot by slot.

    Every slot of the block adds its own tokens one after the other, as in every other backend, so that sums
    are bitwise equal.

    Args:
        sums: `[BN, BD]`. counts: `[BN]`. slot: `[BN]` indices of the block's slots.
        x: rows `[:, D]`; token t of the chunk is row `place + t * stride`.
        slots: pointer to the slots of the chunk's C tokens.
        numbers: `[:]` increment of `counts` for each row of x, or None for 1.
        token_weights: `[:]` factor of each row of x, or None for 1.
    """
    for first in range(0, C, TB):
        t = first + tl.arange(0, TB)
        own = tl.load(slots + t, mask=t < C, other=-1)
        is_mine = own[None, :] == slot[:, None]
        token = tl.min(tl.where(is_mine, t[None, :], C), 1)
        while tl.min(token, 0) < C:
            has_token = token < C
            row = place + token.to(tl.int64) * stride
            added = rows(x, row, has_token, D, BD).to(tl.float32)
            if token_weights is not None:
                factor = tl.load(token_weights + row, mask=has_token, other=0.0)
                # A weight of 0 must leave no trace, but 0 times NaN would be NaN.
                added = tl.where((factor > 0)[:, None], factor[:, None] * added, 0.0)
            # Adding zero may turn -0.0 into 0.0, which compares equal.
            sums += SIGN * added
            if numbers is None:
                counts += SIGN * has_token.to(counts.dtype)
            else:
                counts += SIGN * tl.load(numbers + row, mask=has_token, other=0)
            token = tl.min(tl.where(is_mine & (t[None, :] > token[:, None]), t[None, :], C), 1)
    return sums, counts


@triton.jit
def keep_rows(kept_keys, kept_values, kept_weight, place, p, C, keys, values, weights, K, V,
              BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """Copy a block of slots, before a chunk changes them, to places `p` of the chunk; none for p = C."""
    put_rows(kept_keys, place + p, keys, p < C, K, BK)
    put_rows(kept_values, place + p, values, p < C, V, BV)
    tl.store(kept_weight + place + p, weights, mask=p < C)


@triton.jit
def _top_bits(x):
    """float32 truncated to bfloat16 precision; the remainder is exact in float32."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _scores(mean, keys, IS_SPLIT: tl.constexpr):
    """Dot products `[BN, BT]` of means `[BN, K]` (float32) with keys `[BT, K]`, exact up to float32 rounding.

    A float32 number is exactly the sum of three bfloat16 numbers, so for bfloat16 keys (IS_SPLIT) three
    products on tensor cores replace a float32 product.
    """
    scores = tl.zeros([mean.shape[0], keys.shape[0]], tl.float32)
    if IS_SPLIT:
        high = _top_bits(mean)
        middle = _top_bits(mean - high)
        low = mean - high - middle
        scores = dot(low, tl.trans(keys), scores)
        scores = dot(middle, tl.trans(keys), scores)
        scores = dot(high, tl.trans(keys), scores)
    else:
        scores = dot(mean, tl.trans(keys.to(tl.float32)), scores)
    return scores


@triton.jit(do_not_specialize=["previous", "current", "base", "num_next"])
def advance(
    k, v, slots, key_sum, value_sum, count, table,
    snap_keys, snap_values, snap_bias, token_weights, weight, kept_keys, kept_values, kept_weight,
    best, second, winner, cosine, longest, previous, current, base, num_next,
    W, C, H, K, V, M, NB,
    HAS_PREVIOUS: tl.constexpr, HAS_NEXT: tl.constexpr, HAS_READ: tl.constexpr, FORMAT: tl.constexpr,
    HAS_MEANS: tl.constexpr, IS_SPLIT: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One step of the recurrence; grid (streams, blocks of slots).

    Args:
        k: `[num_chunks, W, H, K]` keys. v: values.
        slots: `[num_chunks, H, W]` int32 slot of each token.
        key_sum: `[R, H, M, K]`, updated in place. value_sum, count: likewise.
        table: the table of chunks of `work.py`.
        snap_keys: `[entries, H, M, K]` the segment's dictionaries. snap_values, snap_bias: likewise; the bias
            is log2 of the count or weight.
        token_weights: `[num_chunks, W, H]` weights of tokens, or None. weight: `[R, H, M]` weights of slots,
            updated in place, or None.
        kept_keys: `[entries, H, C, K]` receives the changed slots from before each chunk, each at the
            position of its first token, or None if not needed. kept_values, kept_weight: likewise.
        best: `[streams, NB, C]` largest score of each token in each block. second, winner, cosine: likewise
            the second largest score, the slot of the largest, and the maximum of the scores divided by the
            lengths of the means.
        longest: `[streams, NB]` length of the longest mean; inf if a mean is too long or short for float32.
        previous: entry of the first row's chunk to merge. current: entry of its chunk to score.
            base: first entry of the segment.
        num_next: number of rows with a chunk to score.
    """
    stream = tl.program_id(0)
    block = tl.program_id(1)
    row = stream // H
    head = stream % H
    slot = block * BN + tl.arange(0, BN)
    place = stream.to(tl.int64) * M + slot
    num_open = 0
    if HAS_PREVIOUS:
        num_open = tl.load(table + (previous + row) * COLUMNS + AFTER)
    else:
        # If a stream has no slots, keys are compared with the key that opens slot 0.
        num_open = tl.maximum(tl.load(table + (current + row) * COLUMNS + BEFORE), 1)
    if block * BN < num_open:
        is_in = slot < M
        counts = tl.load(count + place, mask=is_in, other=0)
        key_sums = rows(key_sum, place, is_in, K, BK)
        value_sums = rows(value_sum, place, is_in, V, BV)
        mass = counts
        if weight is not None:
            mass = tl.load(weight + place, mask=is_in, other=0.0)
        if HAS_PREVIOUS:
            chunk = tl.load(table + (previous + row) * COLUMNS + CHUNK).to(tl.int64)
            chosen = slots + (chunk * H + head) * W
            first = chunk * W * H + head
            before = counts
            if kept_keys is not None:
                kept = ((previous + row).to(tl.int64) * H + head) * C
                p = place_of(slot, chosen, BT, C)
                keep_rows(
                    kept_keys, kept_values, kept_weight, kept, p, C, key_sums, value_sums, mass, K, V, BK, BV
                )
            # The mass is the weight, or a second copy of the count.
            key_sums, mass = add_tokens(
                key_sums, mass, slot, k, chosen, first, H, C, K, 1, BT, BK, token_weights, token_weights
            )
            value_sums, counts = add_tokens(
                value_sums, counts, slot, v, chosen, first, H, C, V, 1, BT, BV, None, token_weights
            )
            key_sums = in_format(key_sums, mass, FORMAT, HAS_MEANS)
            value_sums = in_format(value_sums, mass, FORMAT, HAS_MEANS)
            is_changed = is_in & (counts != before)
            if weight is not None:
                tl.store(weight + place, mass, mask=is_changed)
            put_rows(key_sum, place, key_sums, is_changed, K, BK)
            put_rows(value_sum, place, value_sums, is_changed, V, BV)
            tl.store(count + place, counts, mask=is_changed)
        if HAS_NEXT:
            if row < num_next:
                entry = current + row
                chunk = tl.load(table + entry * COLUMNS + CHUNK).to(tl.int64)
                num = tl.load(table + entry * COLUMNS + BEFORE)
                tokens = tl.load(table + entry * COLUMNS + TOKENS)
                mean = means(key_sums, mass)
                is_used = slot < num
                if HAS_READ:
                    snap_at = ((entry - base).to(tl.int64) * H + head) * M + slot
                    put_rows(snap_keys, snap_at, mean, is_used, K, BK)
                    put_rows(snap_values, snap_at, means(value_sums, mass), is_used, V, BV)
                    tl.store(snap_bias + snap_at, log2_mass(mass), mask=is_used)
                if tl.load(table + entry * COLUMNS + IS_COMPLETE) != 0:
                    # Slots of weight 0 attract no key.
                    is_used &= mass > 0
                    if num == 0:
                        _own, own, own_mass = opener(k, token_weights, chunk, head, W, H, C, K, BT, BK)
                        mean = tl.where((slot == 0)[:, None], own[None, :], 0.0)
                        is_used = (slot == 0) & (slot * 0 + own_mass > 0)
                    length = tl.sqrt(tl.sum(mean * mean, 1))
                    # If a mean is extreme, inf makes `nearest` decide in float64.
                    known = tl.where(is_used & are_extreme(mean, length), float("inf"), length)
                    tl.store(longest + stream * NB + block, tl.max(known, 0))
                    inverse = 1.0 / tl.maximum(length, TINY)
                    found = (stream.to(tl.int64) * NB + block) * C
                    for start in range(0, tokens, BT):
                        t = start + tl.arange(0, BT)
                        is_token = t < tokens
                        keys = rows(k, (chunk * W + t) * H + head, is_token, K, BK)
                        scores = _scores(mean, keys, IS_SPLIT)
                        # NaN becomes inf, because comparisons with NaN are always false.
                        scores = tl.where(scores == scores, scores, float("inf"))
                        scores = tl.where(is_used[:, None], scores, -float("inf"))
                        top = tl.max(scores, 0)
                        arg = tl.min(tl.where(scores == top[None, :], slot[:, None], M), 0)
                        rest = tl.where(slot[:, None] == arg[None, :], -float("inf"), scores)
                        cosines = tl.where(is_used[:, None], scores * inverse[:, None], -float("inf"))
                        tl.store(best + found + t, top, mask=is_token)
                        tl.store(winner + found + t, arg, mask=is_token)
                        tl.store(second + found + t, tl.max(rest, 0), mask=is_token)
                        tl.store(cosine + found + t, tl.max(cosines, 0), mask=is_token)
