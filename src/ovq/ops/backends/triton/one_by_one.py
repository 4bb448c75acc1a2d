"""merge="ward-sqrt": merges the cheapest pair again and again, in one program per stream.

By this rule a merged item can come nearer to a third one than both of its parts were (`docs/math.md`, section
5), so no second merge is sure before the first one is made. So it is by "ward" too where tokens have weights:
an item of hardly any weight costs nothing to merge with any other, and of so many ties the order decides.

What makes a step short is a table of all pairs of items, `[L, L]` float32, of what their costs are not below.
It is made by products on the tensor cores, with all programs of the GPU. A merge changes one row and one
column of it, by (20) and (21), without looking at a mean. Costs in float64 are computed only of the pairs
that may be the cheapest.

Columns are `[slots | tokens]`, and a merged item stays in the lower column of its two. A pair is *kept* by
the item that was merged later, and among those never merged by the higher column. So a merge leaves alone
what is known of the other items: their pairs with what was merged are kept by that.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import put_rows, rows
from ovq.ops.backends.triton.items import (
    BOUND,
    CONTROL,
    COST,
    COUNT,
    FACTOR,
    INT_FIELDS,
    INTO,
    LEFT,
    NUM_FIELDS,
    PARTNER,
    SHARED,
    SINCE,
    TIED,
)
from ovq.ops.backends.triton.pairs import MOST_BOUND, bounds_of, is_used

# By (21), what two items cost with a third one times this is what the merged one costs with it, at least. By
# "ward" the merged one costs as much.
NEARER = tl.constexpr(0.866)
# Share of the costs in (20) that float32 may be off by; square roots and divisions are approximate.
OFF_BY = tl.constexpr(2e-6)
# The partner of an item whose nearest was never found; it is -2 - p once p has merged or left.
NEVER = tl.constexpr(-1)


@triton.jit(do_not_specialize=["base"])
def bound_pairs(
    item_keys, item_values, ints, nums, table, base, K, V, L, PS,
    IS_SQRT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What the costs of all pairs are not below; grid (streams, tiles of columns, tiles of columns).

    Args:
        item_keys: `[streams, L, K]` float32 means of the columns. item_values: likewise.
        ints, nums: the tables of `items.py`.
        table: `[streams, L, L]` float32, receives the bounds, of streams from `base` on.
        PS: column of the first token.
        IS_SQRT: by "ward-sqrt"; else by "ward". HAS_WEIGHTS: whether tokens have weights.
    """
    local, tile, other = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stream = base + local
    ints += stream.to(tl.int64) * INT_FIELDS * L
    nums += stream.to(tl.int64) * NUM_FIELDS * L
    is_needed = (other <= tile) & (tl.load(ints + L * CONTROL + LEFT) > 0)
    if is_needed & is_used(tile * TILE, ints, L, PS, 0) & is_used(other * TILE, ints, L, PS, 0):
        a, b = tile * TILE + tl.arange(0, TILE), other * TILE + tl.arange(0, TILE)
        has_a = tl.load(ints + L * INTO + a) == a
        bounds = bounds_of(
            stream, a, has_a, b, item_keys, item_values, ints, nums, K, V, L, IS_SQRT, HAS_WEIGHTS, BK, BV
        )
        line = local.to(tl.int64) * L
        tl.store(table + (line + a)[:, None] * L + b[None, :], bounds)
        if tile != other:
            tl.store(table + (line + b)[:, None] * L + a[None, :], tl.trans(bounds))


@triton.jit
def _mean(narrow, wide, stream, column, ints, L, LAST, D, BD: tl.constexpr):
    """The mean `[1, BD]` of a column in float64; what was merged is kept so, in the order of merges."""
    one = tl.zeros([1], tl.int32)
    since = tl.load(ints + L * SINCE + column) + one
    mean = rows(narrow, stream.to(tl.int64) * L + column + one, since == 0, D, BD).to(tl.float64)
    kept = rows(wide, stream.to(tl.int64) * LAST + since - 1, since > 0, D, BD)
    return tl.where((since > 0)[:, None], kept, mean)


@triton.jit
def _cost(
    a, b, stream, item_keys, item_values, wide_keys, wide_values, ints, nums, K, V, L, LAST,
    IS_SQRT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What merging two columns costs; inf if that is not a number."""
    shared = nums + L * SHARED
    m, n = tl.load(nums + L * COUNT + a), tl.load(nums + L * COUNT + b)
    x = _mean(item_keys, wide_keys, stream, a, ints, L, LAST, K, BK)
    x -= _mean(item_keys, wide_keys, stream, b, ints, L, LAST, K, BK)
    y = _mean(item_values, wide_values, stream, a, ints, L, LAST, V, BV)
    y -= _mean(item_values, wide_values, stream, b, ints, L, LAST, V, BV)
    keys, values = tl.sum(tl.sum(x * x, 1), 0), tl.sum(tl.sum(y * y, 1), 0)
    share = m * n / tl.where(m + n > 0, m + n, 1.0)
    if IS_SQRT:
        share = tl.sqrt(share)
    cost = share * (keys + tl.load(shared + FACTOR) * values)
    cost = tl.where(cost < float("inf"), cost, float("inf"))
    return tl.where(cost <= tl.load(shared + TIED), 0.0, cost)


@triton.jit
def _find_nearest(
    item, most, stream, item_keys, item_values, wide_keys, wide_values, ints, nums, table, K, V, L, LAST,
    IS_SQRT: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Find the nearest of the items whose pairs with `item` it keeps, by at most `most` costs in float64.

    Of those that are equally near, up to the tie, it is the lowest. If `most` costs do not decide, the item
    gets a bound and no partner.

    Args:
        table: that of the stream, `[L, L]`.
    """
    tie = tl.load(nums + L * SHARED + TIED)
    i = tl.arange(0, BL)
    since = tl.load(ints + L * SINCE + i, mask=i < L, other=0)
    # Added to zeros: the interpreter cannot combine what a scalar compares as with masks.
    own = tl.load(ints + L * SINCE + item) + tl.zeros([BL], tl.int32)
    is_kept = (i < L) & (tl.load(ints + L * INTO + i, mask=i < L, other=-1) == i)
    is_kept &= (since < own) | ((own == 0) & (since == 0) & (i < item))
    bounds = tl.load(table + item.to(tl.int64) * L + i, mask=is_kept, other=float("inf"))
    floor = tl.min(bounds, 0)
    best = tie * 0 + float("inf")
    near = best
    partner = item * 0 - 1
    num = item * 0
    while (floor <= best + tie) & (floor < float("inf")) & (num < most):
        # The lowest bound; of what may cost nothing the first, as no other can come before that.
        level = tl.maximum(floor.to(tl.float64), tie)
        at = tl.min(tl.where(bounds.to(tl.float64) <= level, i, L), 0)
        cost = _cost(
            item, at, stream, item_keys, item_values, wide_keys, wide_values, ints, nums, K, V, L, LAST,
            IS_SQRT, BK, BV,
        )  # fmt: skip
        bound = tl.where(cost < 1e-30, 0.0, tl.minimum(cost * (1 - 2e-7), MOST_BOUND)).to(tl.float32)
        bound = tl.where(cost < float("inf"), bound, float("inf"))
        tl.store(table + item.to(tl.int64) * L + at, bound)
        tl.store(table + at.to(tl.int64) * L + item, bound)
        is_lower = (cost < best - tie) | ((cost <= best + tie) & (at < partner)) | (partner < 0)
        partner = tl.where(is_lower, at, partner)
        near = tl.where(is_lower, cost, near)
        best = tl.minimum(best, cost)
        bounds = tl.where((i == at) | (i * 0 + best == 0), float("inf"), bounds)
        floor = tl.min(bounds, 0)
        num += 1
    is_found = (floor > best + tie) | (floor == float("inf"))
    tl.store(ints + L * PARTNER + item, tl.where(is_found, partner, NEVER))
    tl.store(nums + L * BOUND + item, tl.minimum(best, floor.to(tl.float64)))
    tl.store(nums + L * COST + item, near)


@triton.jit(do_not_specialize=["base"])
def find_nearest(
    item_keys, item_values, wide_keys, wide_values, ints, nums, table, base, K, V, L, LAST,
    MOST: tl.constexpr, IS_SQRT: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The nearest of each item, or a bound, before the first merge; grid (streams, any number of programs).

    Args:
        MOST: how many costs to compute for an item; where there are many ties it is left for later.
    """
    local = tl.program_id(0)
    stream = base + local
    ints += stream.to(tl.int64) * INT_FIELDS * L
    nums += stream.to(tl.int64) * NUM_FIELDS * L
    table += local.to(tl.int64) * L * L
    if tl.load(ints + L * CONTROL + LEFT) > 0:
        item = tl.program_id(1)
        while item < L:
            if tl.load(ints + L * INTO + item) == item:
                _find_nearest(
                    item, MOST, stream, item_keys, item_values, wide_keys, wide_values, ints, nums, table,
                    K, V, L, LAST, IS_SQRT, BL, BK, BV,
                )  # fmt: skip
            item += tl.num_programs(1)


@triton.jit
def _merge(
    a, b, cost, is_left, partner, number, stream, item_keys, item_values, wide_keys, wide_values, ints, nums,
    table, K, V, L, LAST, IS_SQRT: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Merge column b into column a, which comes before it, as merge `number` (from 0) of the chunk."""
    count_of = nums + L * COUNT
    i = tl.arange(0, BL)
    is_other = is_left & (i != a) & (i != b)
    m, n = tl.load(count_of + a), tl.load(count_of + b)
    total = m + n
    # Without any weight, it stays what it was.
    divisor = tl.where(total > 0, total, 1.0)
    keys = _mean(item_keys, wide_keys, stream, a, ints, L, LAST, K, BK)
    more = n * _mean(item_keys, wide_keys, stream, b, ints, L, LAST, K, BK)
    keys = tl.where(total > 0, (m * keys + more) / divisor, keys)
    values = _mean(item_values, wide_values, stream, a, ints, L, LAST, V, BV)
    more = n * _mean(item_values, wide_values, stream, b, ints, L, LAST, V, BV)
    values = tl.where(total > 0, (m * values + more) / divisor, values)
    # (20), and not below (21), of which the cheapest pair is only sure up to the tie. Masses are divided by
    # that of the two, since weights may be of any size.
    first = tl.load(table + a.to(tl.int64) * L + i, mask=is_other, other=float("inf"))
    second = tl.load(table + b.to(tl.int64) * L + i, mask=is_other, other=float("inf"))
    c = tl.load(count_of + i, mask=is_other, other=1.0) * (1 / divisor)
    c = tl.minimum(c, MOST_BOUND).to(tl.float32)
    c = c / (1 + c)
    x, y, h = (m / divisor).to(tl.float32), (n / divisor).to(tl.float32), cost.to(tl.float32)
    p, q = x * (1 - c) + c, y * (1 - c) + c
    floor = tl.minimum(first, second)
    if IS_SQRT:
        bound = tl.sqrt(x * p) * first + tl.sqrt(y * q) * second - tl.sqrt(x * y * c) * h
        floor *= NEARER
    else:
        bound = p * first + q * second - c * h
    tie = tl.load(nums + L * SHARED + TIED).to(tl.float32)
    bound -= OFF_BY * (first + second + h) + 2 * tie
    floor = tl.maximum(floor - 2 * tie, 0.0)
    # Not a number where infinite costs meet.
    bound = tl.where(bound > floor, bound, floor)
    lowest = tl.min(bound, 0)
    # All must have read before anything is written.
    tl.debug_barrier()
    place = stream.to(tl.int64) * LAST + number + tl.zeros([1], tl.int32)
    put_rows(wide_keys, place, keys, place >= 0, K, BK)
    put_rows(wide_values, place, values, place >= 0, V, BV)
    tl.store(table + a.to(tl.int64) * L + i, bound, mask=is_other)
    tl.store(table + i.to(tl.int64) * L + a, bound, mask=is_other)
    tl.store(count_of + a, total)
    tl.store(ints + L * SINCE + a, number + 1)
    tl.store(ints + L * INTO + b, a)
    tl.store(nums + L * BOUND + a, lowest.to(tl.float64))
    # What was nearest to one of the two looks for another, when its turn comes.
    is_lost = is_left & ((partner == a) | (partner == b))
    tl.store(ints + L * PARTNER + i, tl.where(i == a, NEVER, -2 - partner), mask=is_lost | (i == a))


@triton.jit(do_not_specialize=["base"])
def merge_one_by_one(
    item_keys, item_values, wide_keys, wide_values, ints, nums, table, base, K, V, L, LAST,
    IS_SQRT: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All merges of a chunk; grid (streams,).

    A step either merges the first of the cheapest pairs, or, if the nearest of an item that may be as near is
    not known, finds that.

    Args:
        wide_keys: `[streams, LAST, K]` float64, receives the means of what was merged. wide_values: likewise.
    """
    local = tl.program_id(0)
    stream = base + local
    ints += stream.to(tl.int64) * INT_FIELDS * L
    nums += stream.to(tl.int64) * NUM_FIELDS * L
    table += local.to(tl.int64) * L * L
    tie = tl.load(nums + L * SHARED + TIED)
    due = tl.load(ints + L * CONTROL + LEFT)
    i = tl.arange(0, BL)
    left = due
    while left > 0:
        is_left = (i < L) & (tl.load(ints + L * INTO + i, mask=i < L, other=-1) == i)
        partner = tl.load(ints + L * PARTNER + i, mask=is_left, other=-1)
        is_known = partner >= 0
        cost = tl.load(nums + L * COST + i, mask=is_known, other=float("inf"))
        bound = tl.load(nums + L * BOUND + i, mask=is_left & (is_known == 0), other=float("inf"))
        lowest = tl.min(cost, 0)
        # The first of the cheapest pairs that are known; if nothing can be compared, of all.
        if lowest < float("inf"):
            pair = tl.minimum(i, partner).to(tl.int64) * L + tl.maximum(i, partner)
            highest = tl.full([BL], 1, tl.int64) << 62
            pair = tl.min(tl.where(is_known & (cost <= lowest + tie), pair, highest), 0)
            a, b = (pair // L).to(tl.int32), (pair % L).to(tl.int32)
        else:
            a = tl.min(tl.where(is_left, i, L), 0)
            b = tl.min(tl.where(is_left & (i != a), i, L), 0)
        # Others may be cheaper, or as cheap and come before it. What is as near to an item as the one that it
        # has lost comes after that one.
        may_precede = tl.minimum(i, -1 - partner) <= a
        is_open = (bound < lowest) | ((bound <= lowest + tie) & may_precede)
        is_open &= bound < float("inf")
        unknown = tl.min(tl.where(is_open, bound, float("inf")), 0)
        if unknown < float("inf"):
            item = tl.min(tl.where(is_open & (bound == unknown), i, L), 0)
            _find_nearest(
                item, L, stream, item_keys, item_values, wide_keys, wide_values, ints, nums, table, K, V, L,
                LAST, IS_SQRT, BL, BK, BV,
            )  # fmt: skip
        else:
            _merge(
                a, b, lowest, is_left, partner, due - left, stream, item_keys, item_values, wide_keys,
                wide_values, ints, nums, table, K, V, L, LAST, IS_SQRT, BL, BK, BV,
            )  # fmt: skip
            left -= 1
        tl.debug_barrier()
