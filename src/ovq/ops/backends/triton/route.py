"""Routing kernels: the slot of each key and the keys that open slots, decided as in float64.

The scores of `recurrence.py` are exact up to float32 rounding. If that cannot decide which of two slots is
nearer, or which of two keys is more novel, the candidates' scores are recomputed in float64. Scores within
`options.TIE` are equal; the lowest slot or earliest token wins, as in every backend. Keys and means whose
lengths make float32 products underflow or overflow (outside `options.ORDINARY`) are compared in float64 from
the start.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import (
    AFTER,
    BEFORE,
    CHUNK,
    COLUMNS,
    EPS,
    IS_COMPLETE,
    NO_COSINE,
    NO_WEIGHT,
    TIE,
    TINY,
    are_extreme,
    means,
    opener,
    rows,
)


@triton.jit
def _exact(key, key_sum, mass, stream, block, num_open, is_fresh, first_key, first_mass, M, K,
           BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Dot products `[BN]` of a block's means with a key `[BK]`, and lengths of the means, in float64."""
    slot = block * BN + tl.arange(0, BN)
    is_used = slot < num_open
    place = stream.to(tl.int64) * M + slot
    own_mass = tl.load(mass + place, mask=is_used & (slot < M), other=0)
    mean = means(rows(key_sum, place, is_used & (slot < M), K, BK), own_mass)
    has_mass = own_mass > 0
    if is_fresh:
        mean = tl.where((slot == 0)[:, None], first_key[None, :], 0.0)
        has_mass = slot * 0 + first_mass > 0
    is_used &= has_mass
    mean = mean.to(tl.float64)
    product = tl.sum(mean * key[None, :], 1)
    length = tl.sqrt(tl.sum(mean * mean, 1))
    return tl.where(is_used, product, -float("inf")), length


@triton.jit
def _key(k, chunk, t, head, W, H, K, BK: tl.constexpr):
    """One key `[BK]` in float32."""
    d = tl.arange(0, BK)
    place = ((chunk * W + t) * H + head) * K + d
    return tl.load(k + place, mask=d < K, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["current"])
def nearest(
    k, token_weights, key_sum, mass, table, best, second, winner, cosine, longest, slots, novelty, current,
    W, C, H, K, M, NB, ROUNDING: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Nearest slot of every key of a complete chunk; grid (streams, blocks of tokens).

    Args:
        token_weights: as in `advance`. mass: `[R, H, M]` counts, or weights, of slots.
        best, second, winner, cosine, longest: results of `advance` for each block of slots.
        slots: `[num_chunks, H, W]` receives the slots.
        novelty: `[streams, C]` receives the highest cosine of each key with a mean, in float32.
        ROUNDING: bound of the rounding error of a comparison of scores, in units of K eps |k| |D|.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    entry = table + (current + row) * COLUMNS
    if tl.load(entry + IS_COMPLETE) != 0:
        chunk = tl.load(entry + CHUNK).to(tl.int64)
        before = tl.load(entry + BEFORE)
        num_open = tl.maximum(before, 1)
        is_fresh = before == 0
        _first, first_key, first_mass = opener(k, token_weights, chunk, head, W, H, C, K, BT, BK)
        num_blocks = tl.cdiv(num_open, BN)
        t = tl.program_id(1) * BT + tl.arange(0, BT)
        is_token = t < C
        top = tl.full([BT], -float("inf"), tl.float32)
        next_top = tl.full([BT], -float("inf"), tl.float32)
        nearest_cosine = tl.full([BT], -float("inf"), tl.float32)
        chosen = tl.zeros([BT], tl.int32)
        longest_mean = 0.0
        found = stream.to(tl.int64) * NB * C
        for block in range(0, num_blocks):
            place = found + block * C + t
            own = tl.load(best + place, mask=is_token, other=-float("inf"))
            own_next = tl.load(second + place, mask=is_token, other=-float("inf"))
            next_top = tl.maximum(tl.maximum(next_top, own_next), tl.minimum(top, own))
            chosen = tl.where(own > top, tl.load(winner + place, mask=is_token, other=0), chosen)
            top = tl.maximum(top, own)
            own_cosine = tl.load(cosine + place, mask=is_token, other=-float("inf"))
            nearest_cosine = tl.maximum(nearest_cosine, own_cosine)
            longest_mean = tl.maximum(longest_mean, tl.load(longest + stream * NB + block))
        keys = rows(k, (chunk * W + t) * H + head, is_token, K, BK).to(tl.float32)
        length = tl.sqrt(tl.sum(keys * keys, 1))
        tolerance = (ROUNDING * K * EPS + 2 * TIE) * length * longest_mean
        is_finite = tl.abs(top) < float("inf")
        # One extreme mean requires float64 for all keys but zero keys, which tie with every slot.
        is_wide = is_token & are_extreme(keys, tl.where(longest_mean < float("inf"), length, float("inf")))
        is_contested = is_wide | (is_token & is_finite & (next_top >= top - tolerance))
        wide_cosine = tl.zeros([BT], tl.float32)
        j = tl.min(tl.where(is_contested, t, C), 0)
        while j < C:
            is_mine = t == j
            is_all = tl.max((is_mine & is_wide).to(tl.int32), 0) > 0
            floor = tl.sum(tl.where(is_mine & (is_wide == 0), top - tolerance, 0.0), 0)
            floor = tl.where(is_all, -float("inf"), floor)
            key = _key(k, chunk, j, head, W, H, K, BK).to(tl.float64)
            own_length = tl.sqrt(tl.sum(key * key, 0))
            highest = tl.max(tl.full([BN], -float("inf"), tl.float64), 0)
            best_cosine = highest
            longest_seen = own_length * 0.0
            for block in range(0, num_blocks):
                if tl.load(best + found + block * C + j) >= floor:
                    product, lengths = _exact(
                        key, key_sum, mass, stream, block, num_open, is_fresh, first_key, first_mass, M, K,
                        BN, BK,
                    )  # fmt: skip
                    # NaN becomes inf, because comparisons with NaN are always false.
                    product = tl.where(product == product, product, float("inf"))
                    lengths = tl.where(lengths == lengths, lengths, float("inf"))
                    cosines = product / tl.maximum(own_length, TINY) / tl.maximum(lengths, TINY)
                    cosines = tl.where(cosines == cosines, cosines, float("inf"))
                    highest = tl.maximum(highest, tl.max(product, 0))
                    best_cosine = tl.maximum(best_cosine, tl.max(cosines, 0))
                    longest_seen = tl.maximum(longest_seen, tl.max(lengths, 0))
                    if is_all:
                        # Otherwise a float32 cosine could make `open_slots` skip the block.
                        tl.store(cosine + found + block * C + j, float("inf"))
            longest_seen = tl.where(is_all, longest_seen, tl.cast(longest_mean, tl.float64))
            floor_exact = highest - TIE * own_length * longest_seen
            lowest = M
            for block in range(0, num_blocks):
                if tl.load(best + found + block * C + j) >= floor:
                    product, _ = _exact(
                        key, key_sum, mass, stream, block, num_open, is_fresh, first_key, first_mass, M, K,
                        BN, BK,
                    )  # fmt: skip
                    slot = block * BN + tl.arange(0, BN)
                    lowest = tl.minimum(lowest, tl.min(tl.where(product >= floor_exact, slot, M), 0))
            lowest = tl.where(tl.abs(highest) < float("inf"), lowest, 0)
            chosen = tl.where(is_mine, lowest, chosen)
            wide_cosine = tl.where(is_mine, best_cosine.to(tl.float32), wide_cosine)
            is_contested = is_contested & (t != j)
            j = tl.min(tl.where(is_contested, t, C), 0)
        # Non-finite keys go to slot 0.
        chosen = tl.where(is_finite | is_wide, chosen, 0)
        tl.store(slots + (chunk * H + head) * W + t, chosen, mask=is_token)
        scaled = tl.where(is_wide, wide_cosine, nearest_cosine / tl.maximum(length, TINY))
        # They have no cosine and are last to open slots, before keys of weight 0.
        scaled = tl.where(tl.abs(scaled) < float("inf"), scaled, NO_COSINE)
        if token_weights is not None:
            own = tl.load(token_weights + (chunk * W + t) * H + head, mask=is_token, other=0.0)
            scaled = tl.where(own > 0, scaled, NO_WEIGHT)
        tl.store(novelty + stream.to(tl.int64) * C + t, scaled, mask=is_token)


@triton.jit(do_not_specialize=["current"])
def open_slots(
    k, token_weights, key_sum, mass, table, cosine, slots, novelty, current, W, C, H, K, M, NB,
    ROUNDING: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Assign new slots to the keys of a complete chunk whose highest cosine is lowest; grid (streams,).

    Args:
        cosine: `[streams, NB, C]`, from `advance`, for each block of slots.
        slots: `[num_chunks, H, W]`, updated for the keys that open slots.
        novelty: `[streams, C]` from `nearest`.
        BC: C, rounded up to a power of two.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    entry = table + (current + row) * COLUMNS
    before = tl.load(entry + BEFORE)
    existing = tl.maximum(before, 1)
    num = tl.load(entry + AFTER) - existing
    if num > 0:
        chunk = tl.load(entry + CHUNK).to(tl.int64)
        is_fresh = before == 0
        t = tl.arange(0, BC)
        rough = tl.load(novelty + stream.to(tl.int64) * C + t, mask=t < C, other=8.0)
        # The first key of a stream opens slot 0 anyway.
        first, first_key, first_mass = opener(k, token_weights, chunk, head, W, H, C, K, BC, BK)
        rough = tl.where(is_fresh & (t == first), 4.0, rough)
        ranked = tl.sort(rough)
        boundary = tl.sum(tl.where(t == num - 1, ranked, 0.0), 0)
        following = tl.sum(tl.where(t == num, ranked, 0.0), 0)
        # A cosine is at most 1, with a few more roundings than a dot product.
        tolerance = 2 * (K + 8) * ROUNDING * EPS + 2 * TIE
        novel = rough.to(tl.float64)
        if (num < C) & (following - boundary <= tolerance):
            num_blocks = tl.cdiv(existing, BN)
            is_near = (t < C) & (rough < 1.5) & (tl.abs(rough - boundary) <= 2 * tolerance)
            j = tl.min(tl.where(is_near, t, BC), 0)
            while j < BC:
                key = _key(k, chunk, j, head, W, H, K, BK).to(tl.float64)
                length = tl.maximum(tl.sqrt(tl.sum(key * key, 0)), TINY)
                floor = tl.sum(tl.where(t == j, rough, 0.0), 0) - tolerance
                highest = tl.max(tl.full([BN], -float("inf"), tl.float64), 0)
                for block in range(0, num_blocks):
                    place = (stream.to(tl.int64) * NB + block) * C + j
                    if tl.load(cosine + place) / length >= floor:
                        product, lengths = _exact(
                            key, key_sum, mass, stream, block, existing, is_fresh, first_key, first_mass, M,
                            K, BN, BK,
                        )  # fmt: skip
                        exact = product / length / tl.maximum(lengths, TINY)
                        highest = tl.maximum(highest, tl.max(exact, 0))
                novel = tl.where(t == j, highest, novel)
                is_near = is_near & (t != j)
                j = tl.min(tl.where(is_near, t, BC), 0)
        last = tl.sum(tl.where(t == num - 1, tl.sort(novel), 0.0), 0)
        is_clear = novel < last - TIE
        is_tied = tl.abs(novel - last) <= TIE
        # Ties: the earlier keys open slots. New slots are numbered by position.
        room = num - tl.sum(is_clear.to(tl.int32), 0)
        is_opening = is_clear | (is_tied & (tl.cumsum(is_tied.to(tl.int32), 0) <= room))
        opened = existing + tl.cumsum(is_opening.to(tl.int32), 0) - 1
        tl.store(slots + (chunk * H + head) * W + t, opened, mask=is_opening & (t < C))
