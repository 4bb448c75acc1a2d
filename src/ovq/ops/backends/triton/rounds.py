"""merge="ward": rounds of merges. A round merges all pairs that are sure to be among the next ones.

The order is that of merging the cheapest pair again and again (`docs/math.md`, section 5, has the proof). Of
most items only a bound of their costs is known; a round also lists the items whose nearest it takes to go on.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import put_rows
from ovq.ops.backends.triton.items import (
    BOUND,
    CONTROL,
    COST,
    COUNT,
    HEAD,
    INDEX,
    INT_FIELDS,
    INTO,
    IS_SINGLE,
    LEFT,
    LIMIT,
    LISTED,
    MEMBER,
    MERGED,
    NUM_FIELDS,
    NUM_LISTED,
    ORDINAL,
    OWNER,
    PARTNER,
    SHARED,
    TIED,
    put_items,
)
from ovq.ops.backends.triton.pairs import estimate_listed, is_used, refine_item, wide_rows

# Bits of the keys that are ranked: those of a positive float64 number without the lower half, and those of
# two columns.
FLOAT_BITS = tl.constexpr(31)
INFINITE = tl.constexpr(0x7FF00000)
PAIR_BITS = tl.constexpr(48)


@triton.jit
def _ranked(keys, rank, BITS: tl.constexpr):
    """The number that `rank` of the int64 `keys` are not above, for a rank of 1 the lowest: bit by bit."""
    found = tl.min(keys, 0) * 0
    for back in range(0, BITS):
        above = found | (tl.full([], 1, tl.int64) << (BITS - 1 - back))
        found = tl.where(tl.sum((keys < above).to(tl.int32), 0) < rank, above, found)
    return found


@triton.jit
def _merge(
    stream, num_heads, num_members, start, item_keys, item_values, wide_keys, wide_values, ints, nums, K, V,
    L, LAST, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Means and counts of new columns, of which each is a head and its members.

    Args:
        num_heads: how many columns HEAD lists. num_members: how many MEMBER lists; OWNER has their heads.
        start: how many columns have been merged before.
    """
    count = nums + L * COUNT
    for q_from in range(0, num_heads, BQ):
        q = q_from + tl.arange(0, BQ)
        is_head = q < num_heads
        column = tl.load(ints + L * HEAD + q, mask=is_head, other=0)
        total = tl.load(count + column, mask=is_head, other=1.0)
        keys = wide_rows(item_keys, wide_keys, stream, column, is_head, L, LAST, K, BK) * total[:, None]
        values = wide_rows(item_values, wide_values, stream, column, is_head, L, LAST, V, BV) * total[:, None]
        for s_from in range(0, num_members, BQ):
            s = s_from + tl.arange(0, BQ)
            owner = tl.load(ints + L * OWNER + s, mask=s < num_members, other=-1)
            is_mine = owner[None, :] == q[:, None]
            member = tl.min(tl.where(is_mine, s[None, :], L), 1)
            while tl.min(member, 0) < L:
                has_member = member < L
                column = tl.load(ints + L * MEMBER + member, mask=has_member, other=0)
                own = tl.load(count + column, mask=has_member, other=0.0)
                more = wide_rows(item_keys, wide_keys, stream, column, has_member, L, LAST, K, BK)
                keys += more * own[:, None]
                more = wide_rows(item_values, wide_values, stream, column, has_member, L, LAST, V, BV)
                values += more * own[:, None]
                total += own
                member = tl.min(tl.where(is_mine & (s[None, :] > member[:, None]), s[None, :], L), 1)
        keys /= total[:, None]
        values /= total[:, None]
        place = stream.to(tl.int64) * LAST + start + q
        put_rows(wide_keys, place, keys, is_head, K, BK)
        put_rows(wide_values, place, values, is_head, V, BV)
        column = L - LAST + start + q
        put_items(
            item_keys, item_values, nums, stream, column, keys.to(tl.float32), values.to(tl.float32), is_head,
            K, V, L, BK, BV,
        )  # fmt: skip
        tl.store(count + column, total, mask=is_head)


@triton.jit
def merge_round(
    stream, item_keys, item_values, wide_keys, wide_values, ints, nums, K, V, L, LAST,
    AHEAD: tl.constexpr, BL: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Merge the pairs that are sure to be next, and list the items that are to be refined.

    Args:
        AHEAD: how many items to list beyond those of which one must be next: more take fewer rounds.
    """
    control, shared = ints + L * CONTROL, nums + L * SHARED
    left, tie = tl.load(control + LEFT), tl.load(shared + TIED)
    into, index_of = ints + L * INTO, ints + L * INDEX
    partner_of, single = ints + L * PARTNER, ints + L * IS_SINGLE
    cost_of, bound_of = nums + L * COST, nums + L * BOUND
    i = tl.arange(0, BL)
    is_left = (i < L) & (tl.load(into + i, mask=i < L, other=-1) == i)
    bound = tl.load(bound_of + i, mask=is_left, other=float("inf"))
    partner = tl.load(partner_of + i, mask=is_left, other=-1)
    is_known = (partner >= 0) & (tl.load(into + partner, mask=partner >= 0, other=-1) == partner)
    cost = tl.load(cost_of + i, mask=is_known, other=float("inf"))
    index = tl.load(index_of + i, mask=is_known, other=0)
    other_index = tl.load(index_of + partner, mask=is_known, other=0)
    first, last = tl.minimum(index, other_index), tl.maximum(index, other_index)
    pair = first.to(tl.int64) * L + last
    is_later = is_known & (index == last)
    is_open = is_left & (is_known == 0)
    # No pair that is not known costs less than this; the interpreter cannot spread what a scalar compares as.
    unknown = tl.min(tl.where(is_open, bound, float("inf")), 0) + tl.zeros([BL], tl.float64)
    lowest = tl.min(cost, 0)
    # Fewer than `left` merges come before a pair that costs less than this: they are made among the items
    # whose bounds are as low, of which two are its own, and leave at least one.
    bits = (tl.maximum(bound, 0.0).to(tl.int64, bitcast=True)) >> 32
    limit = (_ranked(bits, left + 2, FLOAT_BITS) << 32).to(tl.float64, bitcast=True)
    # 1. Repeats merge at no cost, before all others, starting with those of the lowest item.
    beyond = tl.load(partner_of + partner, mask=is_known, other=0)
    is_chained = tl.load(cost_of + partner, mask=is_known & (beyond >= 0), other=1.0) == 0
    is_chained &= other_index > tl.load(index_of + beyond, mask=is_known & (beyond >= 0), other=L)
    is_chosen = is_later & (cost == 0) & (is_chained == 0) & (unknown > tie)
    highest = tl.full([BL], 1, tl.int64) << PAIR_BITS
    if tl.sum(is_chosen.to(tl.int32), 0) > left:
        is_chosen = is_chosen & (pair <= _ranked(tl.where(is_chosen, pair, highest), left, PAIR_BITS))
    if tl.max(is_chosen.to(tl.int32), 0) == 0:
        # 2. Pairs that are each other's nearest, with no other as near, and sure to be among the next.
        is_mutual = is_later & (beyond == i)
        is_mutual &= tl.load(single + i, mask=is_known, other=0) != 0
        is_mutual &= tl.load(single + partner, mask=is_known, other=0) != 0
        is_chosen = is_mutual & (cost + tie < limit) & (cost + tie < unknown)
        if tl.max(is_chosen.to(tl.int32), 0) == 0:
            # 3. The order decides: the first of the cheapest pairs, if all that may be as cheap are known.
            is_cheapest = is_known & (cost <= lowest + tie)
            next_pair = tl.min(tl.where(is_cheapest, pair, highest), 0)
            is_next = is_cheapest & (pair == next_pair)
            # If nothing can be compared, the lowest is infinite.
            is_next &= (lowest + tie < unknown) | (unknown == float("inf"))
            is_chosen = is_next & (i == tl.min(tl.where(is_next, i, BL), 0))
    num_chosen = tl.sum(is_chosen.to(tl.int32), 0)
    before = tl.load(control + MERGED)
    num_heads = 0
    if num_chosen > 0:
        lower = tl.where(index == first, i, partner)
        upper = tl.where(index == first, partner, i)
        ordinal_of = ints + L * ORDINAL
        tl.store(ordinal_of + i, -1 + 0 * i, mask=i < L)
        tl.debug_barrier()
        tl.store(ordinal_of + lower, 0 * i, mask=is_chosen)
        tl.debug_barrier()
        is_head = tl.load(ordinal_of + i, mask=i < L, other=-1) == 0
        ordinal = tl.cumsum(is_head.to(tl.int32), 0) - 1
        num_heads = tl.sum(is_head.to(tl.int32), 0)
        tl.debug_barrier()
        tl.store(ordinal_of + i, ordinal, mask=is_head)
        tl.store(ints + L * HEAD + ordinal, i, mask=is_head)
        tl.debug_barrier()
        owner = tl.load(ordinal_of + lower, mask=is_chosen, other=0)
        member = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
        tl.store(ints + L * MEMBER + member, upper, mask=is_chosen)
        tl.store(ints + L * OWNER + member, owner, mask=is_chosen)
        tl.debug_barrier()
        _merge(
            stream, num_heads, num_chosen, before, item_keys, item_values, wide_keys, wide_values, ints, nums,
            K, V, L, LAST, BQ, BK, BV,
        )  # fmt: skip
        column = L - LAST + before + owner
        tl.store(into + lower, column, mask=is_chosen)
        tl.store(into + upper, column, mask=is_chosen)
        tl.store(into + column, column, mask=is_chosen)
        tl.store(index_of + column, first, mask=is_chosen)
        tl.store(partner_of + column, -1 + 0 * i, mask=is_chosen)
        # Nothing is nearer to what was merged than its parts were to each other.
        tl.store(bound_of + column, tl.where(cost > tie, cost, 0.0), mask=is_chosen)
        tl.debug_barrier()
    left -= num_chosen
    # All that may be as near as the cheapest pair must be known, and so must `left` items, to go on.
    # The lower half of the bits is not ranked: up here, down for `limit`.
    reach = tl.minimum(_ranked(bits, left + 2 + AHEAD, FLOAT_BITS) + 1, INFINITE)
    reach = (reach << 32).to(tl.float64, bitcast=True)
    reach = tl.maximum(reach, tl.where(lowest < float("inf"), lowest + tie, 0.0))
    reach = tl.where(left > 0, reach, -1.0)
    is_left = (i < L) & (tl.load(into + i, mask=i < L, other=-1) == i)
    partner = tl.load(partner_of + i, mask=is_left, other=-1)
    is_known = (partner >= 0) & (tl.load(into + partner, mask=partner >= 0, other=-1) == partner)
    is_listed = is_left & (is_known == 0) & (tl.load(bound_of + i, mask=is_left, other=float("inf")) <= reach)
    tl.store(ints + L * LISTED + tl.cumsum(is_listed.to(tl.int32), 0) - 1, i, mask=is_listed)
    tl.store(control + NUM_LISTED, tl.sum(is_listed.to(tl.int32), 0))
    tl.store(control + LEFT, left)
    tl.store(control + MERGED, before + num_heads)
    tl.store(shared + LIMIT, reach)


@triton.jit
def merge_pairs(
    item_keys, item_values, wide_keys, wide_values, ints, nums, K, V, L, LAST,
    AHEAD: tl.constexpr, BL: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One round of merges; grid (streams,)."""
    stream = tl.program_id(0)
    ints += stream.to(tl.int64) * INT_FIELDS * L
    nums += stream.to(tl.int64) * NUM_FIELDS * L
    if tl.load(ints + L * CONTROL + LEFT) > 0:
        merge_round(
            stream, item_keys, item_values, wide_keys, wide_values, ints, nums, K, V, L, LAST, AHEAD, BL, BQ,
            BK, BV,
        )  # fmt: skip


@triton.jit
def finish(
    item_keys, item_values, wide_keys, wide_values, ints, nums, low, K, V, L, PS, LAST,
    AHEAD: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr,
    BL: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All rounds that are left, in one program per stream; grid (streams,)."""
    stream = tl.program_id(0)
    ints += stream.to(tl.int64) * INT_FIELDS * L
    nums += stream.to(tl.int64) * NUM_FIELDS * L
    control = ints + L * CONTROL
    left = tl.load(control + LEFT)
    while left > 0:
        merge_round(
            stream, item_keys, item_values, wide_keys, wide_values, ints, nums, K, V, L, LAST, AHEAD, BL, BQ,
            BK, BV,
        )  # fmt: skip
        tl.debug_barrier()
        left = tl.load(control + LEFT)
        num = tl.load(control + NUM_LISTED)
        if tl.load(control + MERGED) > 0:
            for other in range(0, L // TILE):
                if is_used(other * TILE, ints, L, PS, LAST):
                    for tile in range(0, tl.cdiv(num, ROWS)):
                        estimate_listed(
                            stream, tile, other, item_keys, item_values, ints, nums, low, K, V, L, ROWS, TILE,
                            GROUP, BK, BV,
                        )  # fmt: skip
            tl.debug_barrier()
        for n in range(0, num):
            refine_item(
                stream, tl.load(ints + L * LISTED + n), item_keys, item_values, wide_keys, wide_values, ints,
                nums, low, K, V, L, PS, LAST, GROUP, BG, BK, BV,
            )  # fmt: skip
        tl.debug_barrier()
