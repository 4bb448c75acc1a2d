"""merge="ward": the nearest item of each item, as float64 decides.

`estimate` bounds the costs of an item from below: it computes products on the tensor cores, and keeps the
lowest bound within each *group* of columns. `refine` looks at the groups that may hold the nearest item, and
computes their costs in float64. The precision of the products therefore decides how many groups are looked
at, and nothing else.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import EPS, dot, rounded, rows
from ovq.ops.backends.triton.items import (
    BOUND,
    CONTROL,
    COST,
    COUNT,
    FACTOR,
    INDEX,
    INT_FIELDS,
    INTO,
    IS_SINGLE,
    IS_WIDE,
    KEY_SQUARE,
    LIMIT,
    LISTED,
    MERGED,
    NUM_FIELDS,
    NUM_LISTED,
    NUM_SLOTS,
    PARTNER,
    SHARED,
    TIED,
    VALUE_SQUARE,
)

# Larger numbers might overflow in float32 where they are multiplied or added up.
MOST_MASS = tl.constexpr(1e37)
MOST_BOUND = tl.constexpr(1e37)


@triton.jit
def _products(a, b):
    """Dot products `[BM, BN]` of rows of `a` and `b`, by three products of bfloat16 parts.

    Each number is the sum of two bfloat16 numbers and a rest of at most 2^-17 of it.
    """
    a_high, b_high = rounded(a), rounded(b)
    a_low, b_low = rounded(a - a_high).to(tl.bfloat16), rounded(b - b_high).to(tl.bfloat16)
    a_high, b_high = a_high.to(tl.bfloat16), b_high.to(tl.bfloat16)
    products = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    products = dot(a_low, tl.trans(b_high), products)
    products = dot(a_high, tl.trans(b_low), products)
    return dot(a_high, tl.trans(b_high), products)


@triton.jit
def _of_groups(low, GROUP: tl.constexpr):
    """The lowest of each row of `low` `[BM, BN]` within each group of columns, `[BM, BN / GROUP]`."""
    return tl.min(tl.reshape(low, [low.shape[0], low.shape[1] // GROUP, GROUP]), 2)


@triton.jit
def _squares(nums, column, mask, factor, L):
    """Squared lengths of columns in float32, values scaled."""
    keys = tl.load(nums + L * KEY_SQUARE + column, mask=mask, other=0.0)
    values = tl.load(nums + L * VALUE_SQUARE + column, mask=mask, other=0.0)
    return (keys + factor * values).to(tl.float32)


@triton.jit
def bounds_of(
    stream, a, has_a, b, item_keys, item_values, ints, nums, K, V, L, IS_SQRT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What the costs of columns `a` `[BM]` with columns `b` `[BN]` are not below, `[BM, BN]`.

    IS_SQRT: by merge="ward-sqrt". HAS_WEIGHTS: whether masses are weights, of any size, and not counts.
    """
    has_b = tl.load(ints + L * INTO + b) == b
    bounds = tl.zeros([a.shape[0], b.shape[0]], tl.float32)
    if tl.load(ints + L * CONTROL + IS_WIDE) == 0:
        factor = tl.load(nums + L * SHARED + FACTOR)
        # As a share of the squared lengths: 3 EPS per term of a product, 100 EPS for what it leaves out.
        kept = 1 - (4 * (K + V) + 256) * EPS
        place = stream.to(tl.int64) * L
        products = _products(
            rows(item_values, place + a, has_a, V, BV), rows(item_values, place + b, has_b, V, BV)
        )
        products *= factor.to(tl.float32)
        products += _products(
            rows(item_keys, place + a, has_a, K, BK), rows(item_keys, place + b, has_b, K, BK)
        )
        of_a = kept * _squares(nums, a, has_a, factor, L)
        of_b = kept * _squares(nums, b, has_b, factor, L)
        m = tl.load(nums + L * COUNT + a, mask=has_a, other=1.0)
        n = tl.load(nums + L * COUNT + b, mask=has_b, other=1.0)
        if HAS_WEIGHTS:
            # Less weight costs less.
            m, n = tl.minimum(m, MOST_MASS).to(tl.float32), tl.minimum(n, MOST_MASS).to(tl.float32)
            total = m[:, None] + n[None, :]
            share = m[:, None] * (n[None, :] / tl.where(total > 0, total, 1.0))
        else:
            m, n = m.to(tl.float32), n.to(tl.float32)
            share = m[:, None] * n[None, :] / (m[:, None] + n[None, :])
        if IS_SQRT:
            share = tl.sqrt(share)
        bounds = tl.maximum(share * (of_a[:, None] + of_b[None, :] - 2 * products), 0.0)
        if HAS_WEIGHTS:
            bounds = tl.minimum(bounds, MOST_BOUND)
    is_pair = has_a[:, None] & has_b[None, :] & (a[:, None] != b[None, :])
    return tl.where(is_pair, bounds, float("inf"))


@triton.jit
def _put_bounds(low, stream, column, mask, tile, bounds, L, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Keep the lowest of `bounds` `[BM, TILE]` within each group of columns of a tile."""
    line = (stream.to(tl.int64) * L + column) * (L // GROUP) + tile * (TILE // GROUP)
    g = tl.arange(0, TILE // GROUP)
    tl.store(
        low + line[:, None] + g[None, :], _of_groups(bounds, GROUP), mask=mask[:, None] & (g >= 0)[None, :]
    )


@triton.jit
def is_used(start, ints, L, PS, LAST):
    """Whether there is or has been an item in the columns from `start` on; parts begin with a tile."""
    control = ints + L * CONTROL
    is_original = (start < tl.load(control + NUM_SLOTS)) | ((start >= PS) & (start < L - LAST))
    return is_original | ((start >= L - LAST) & (start < L - LAST + tl.load(control + MERGED)))


@triton.jit
def estimate_listed(
    stream, tile, other, item_keys, item_values, ints, nums, low, K, V, L,
    ROWS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Bounds of the costs of ROWS of the items listed with a tile of columns, by groups of those."""
    n = tile * ROWS + tl.arange(0, ROWS)
    is_listed = n < tl.load(ints + L * CONTROL + NUM_LISTED)
    a = tl.load(ints + L * LISTED + n, mask=is_listed, other=0)
    b = other * TILE + tl.arange(0, TILE)
    bounds = bounds_of(
        stream, a, is_listed, b, item_keys, item_values, ints, nums, K, V, L, False, False, BK, BV
    )
    _put_bounds(low, stream, a, is_listed, other, bounds, L, TILE, GROUP)


@triton.jit
def wide_rows(narrow, wide, stream, column, mask, L, LAST, D, BD: tl.constexpr):
    """Means `[N, BD]` of columns in float64; those of the last LAST columns, merged ones, are kept so."""
    is_merged = column >= L - LAST
    means = rows(narrow, stream.to(tl.int64) * L + column, mask & (is_merged == 0), D, BD).to(tl.float64)
    kept = rows(wide, stream.to(tl.int64) * LAST + column - (L - LAST), mask & is_merged, D, BD)
    return tl.where(is_merged[:, None], kept, means)


@triton.jit
def _costs(
    group, item, key, value, own, factor, tie, stream, item_keys, item_values, wide_keys, wide_values, ints,
    nums, K, V, L, LAST, GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What merging an item with each column of a group costs `[GROUP]`, the columns, and which there are."""
    column = group * GROUP + tl.arange(0, GROUP)
    is_there = (tl.load(ints + L * INTO + column) == column) & (column != item)
    count = tl.load(nums + L * COUNT + column, mask=is_there, other=1.0)
    x = wide_rows(item_keys, wide_keys, stream, column, is_there, L, LAST, K, BK) - key
    y = wide_rows(item_values, wide_values, stream, column, is_there, L, LAST, V, BV) - value
    cost = count * own / (count + own) * (tl.sum(x * x, 1) + factor * tl.sum(y * y, 1))
    # What is not a number compares as false.
    cost = tl.where(is_there & (cost < float("inf")), cost, float("inf"))
    return tl.where(cost <= tie, 0.0, cost), column, is_there


@triton.jit
def refine_item(
    stream, item, item_keys, item_values, wide_keys, wide_values, ints, nums, low, K, V, L, PS, LAST,
    GROUP: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Find the nearest column of an item, unless none of its costs is within the limit.

    Of columns that are equally near, up to the tie, it is the one with the lowest member.
    """
    shared = nums + L * SHARED
    factor, tie = tl.load(shared + FACTOR), tl.load(shared + TIED)
    g = tl.arange(0, BG)
    is_there = is_used(g * GROUP, ints, L, PS, LAST) & (g * GROUP < L)
    floors = tl.load(
        low + (stream.to(tl.int64) * L + item) * (L // GROUP) + g, mask=is_there, other=float("inf")
    )
    floor = tl.min(floors, 0)
    bound = tl.maximum(tl.load(nums + L * BOUND + item), floor.to(tl.float64))
    partner = item * 0 - 1
    if bound <= tl.load(shared + LIMIT):
        own = tl.load(nums + L * COUNT + item)
        one = item + tl.arange(0, 1)
        key = wide_rows(item_keys, wide_keys, stream, one, one >= 0, L, LAST, K, BK)
        value = wide_rows(item_values, wide_values, stream, one, one >= 0, L, LAST, V, BV)
        best = own * 0 + float("inf")
        second = best
        # Groups in the order of their bounds, as long as one of them may be as near.
        while (floor < float("inf")) & (floor <= best + 2 * tie):
            group = tl.min(tl.where(floors == floor, g, BG), 0)
            costs, column, _ = _costs(
                group, item, key, value, own, factor, tie, stream, item_keys, item_values, wide_keys,
                wide_values, ints, nums, K, V, L, LAST, GROUP, BK, BV,
            )  # fmt: skip
            lowest = tl.min(costs, 0)
            at = tl.min(tl.where(costs == lowest, column, L), 0)
            rest = tl.min(tl.where(column == at, float("inf"), costs), 0)
            second = tl.minimum(tl.maximum(best, lowest), tl.minimum(second, rest))
            partner = tl.where(lowest < best, at, partner)
            best = tl.minimum(best, lowest)
            floors = tl.where(g == group, float("inf"), floors)
            floor = tl.min(floors, 0)
        is_single = second > best + 2 * tie
        bound = best
        near = best
        if is_single == 0:
            # Among all that are as near, the lowest.
            floors = tl.load(
                low + (stream.to(tl.int64) * L + item) * (L // GROUP) + g, mask=is_there, other=float("inf")
            )
            is_waiting = is_there & (floors <= best + tie)
            index = L
            group = tl.min(tl.where(is_waiting, g, BG), 0)
            while group < BG:
                costs, column, is_left = _costs(
                    group, item, key, value, own, factor, tie, stream, item_keys, item_values, wide_keys,
                    wide_values, ints, nums, K, V, L, LAST, GROUP, BK, BV,
                )  # fmt: skip
                members = tl.load(ints + L * INDEX + column)
                members = tl.where(is_left & (costs <= best + tie), members, L)
                own_index = tl.min(members, 0)
                is_lower = own_index < index
                partner = tl.where(is_lower, tl.min(tl.where(members == own_index, column, L), 0), partner)
                near = tl.where(
                    is_lower, tl.min(tl.where(members == own_index, costs, float("inf")), 0), near
                )
                index = tl.minimum(index, own_index)
                is_waiting = is_waiting & (g != group)
                group = tl.min(tl.where(is_waiting, g, BG), 0)
        tl.store(nums + L * COST + item, near)
        tl.store(ints + L * IS_SINGLE + item, is_single.to(tl.int32))
    tl.store(ints + L * PARTNER + item, partner)
    tl.store(nums + L * BOUND + item, bound)


@triton.jit
def estimate_all(
    item_keys, item_values, ints, nums, low, K, V, L, PS, LAST,
    TILE: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Bounds of all pairs of slots and tokens; grid (streams, tiles of columns, tiles of columns).

    Args:
        item_keys: `[streams, L, K]` float32 means of the columns. item_values: likewise.
        ints, nums: the tables of `items.py`.
        low: `[streams, L, L / GROUP]` float32, receives what no cost of a column within a group is below.
        PS: column of the first token. LAST: columns for what is merged.
    """
    stream, tile, other = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    ints += stream.to(tl.int64) * INT_FIELDS * L
    nums += stream.to(tl.int64) * NUM_FIELDS * L
    is_needed = (other <= tile) & (tl.load(ints + L * CONTROL + NUM_LISTED) > 0)
    if is_needed & is_used(tile * TILE, ints, L, PS, LAST) & is_used(other * TILE, ints, L, PS, LAST):
        a, b = tile * TILE + tl.arange(0, TILE), other * TILE + tl.arange(0, TILE)
        has_a = tl.load(ints + L * INTO + a) == a
        bounds = bounds_of(
            stream, a, has_a, b, item_keys, item_values, ints, nums, K, V, L, False, False, BK, BV
        )
        _put_bounds(low, stream, a, a >= 0, other, bounds, L, TILE, GROUP)
        if tile != other:
            _put_bounds(low, stream, b, b >= 0, tile, tl.trans(bounds), L, TILE, GROUP)


@triton.jit
def estimate(
    item_keys, item_values, ints, nums, low, K, V, L, PS, LAST,
    ROWS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Bounds of the items listed with all columns, once something has been merged; grid (streams, any number
    of programs that share the items, tiles of columns).
    """
    stream, other = tl.program_id(0), tl.program_id(2)
    ints += stream.to(tl.int64) * INT_FIELDS * L
    nums += stream.to(tl.int64) * NUM_FIELDS * L
    if (tl.load(ints + L * CONTROL + MERGED) > 0) & is_used(other * TILE, ints, L, PS, LAST):
        num = tl.cdiv(tl.load(ints + L * CONTROL + NUM_LISTED), ROWS)
        for tile in range(tl.program_id(1), num, tl.num_programs(1)):
            estimate_listed(
                stream, tile, other, item_keys, item_values, ints, nums, low, K, V, L, ROWS, TILE, GROUP, BK,
                BV,
            )  # fmt: skip


@triton.jit
def refine(
    item_keys, item_values, wide_keys, wide_values, ints, nums, low, K, V, L, PS, LAST,
    GROUP: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The nearest columns of the items listed; grid (streams, any number of programs that share them).

    Args:
        wide_keys: `[streams, LAST, K]` float64 means of merged columns. wide_values: likewise.
    """
    stream = tl.program_id(0)
    ints += stream.to(tl.int64) * INT_FIELDS * L
    nums += stream.to(tl.int64) * NUM_FIELDS * L
    num = tl.load(ints + L * CONTROL + NUM_LISTED)
    listed = ints + L * LISTED
    for n in range(tl.program_id(1), num, tl.num_programs(1)):
        refine_item(
            stream, tl.load(listed + n), item_keys, item_values, wide_keys, wide_values, ints, nums, low, K,
            V, L, PS, LAST, GROUP, BG, BK, BV,
        )  # fmt: skip
