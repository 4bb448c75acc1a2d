"""The items of a chunk, where pairs of them are merged: its slots and its tokens; and the sums of slots.

Items are *columns* `[slots | tokens]`; by merge="ward" a merge makes a new column after these (`ward.py`).
What is known of the columns of a stream lies in two tables, of integers and of float64 numbers, one field
after the other. Those that join items leave in `INTO` which column each was merged into, directly or not,
and in `INDEX` the lowest item of what is in a column; `merging.py` launches.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import (
    AFTER,
    BEFORE,
    CHUNK,
    COLUMNS,
    IS_COMPLETE,
    LONGEST,
    SHORTEST,
    TIE,
    log2_mass,
    means,
    number,
    place_of,
    put_rows,
    rows,
)
from ovq.ops.backends.triton.recurrence import add_tokens, add_weights, keep_rows

# The tables of a stream are `ints` and `nums`; field F of column i is at F * L + i, for L columns.
# Fields of integers: the column itself, the one it was merged into, or -1; its lowest member; its nearest
# column, or -1 if that is not known; whether no other is as near; lists that the kernels work through; and
# the merge, from 1, that has made a column, or 0 (`one_by_one.py`).
INTO = tl.constexpr(0)
INDEX = tl.constexpr(1)
PARTNER = tl.constexpr(2)
IS_SINGLE = tl.constexpr(3)
LISTED = tl.constexpr(4)
MEMBER = tl.constexpr(5)
OWNER = tl.constexpr(6)
HEAD = tl.constexpr(7)
ORDINAL = tl.constexpr(8)
CONTROL = tl.constexpr(9)
SINCE = tl.constexpr(10)
INT_FIELDS = tl.constexpr(11)
# Entries of CONTROL: merges that are due, merged columns, items listed, whether products in float32 mean
# nothing, and slots before the chunk.
LEFT = tl.constexpr(0)
MERGED = tl.constexpr(1)
NUM_LISTED = tl.constexpr(2)
IS_WIDE = tl.constexpr(3)
NUM_SLOTS = tl.constexpr(4)
# Fields of float64: tokens of the column, or their weight; squared lengths of its means; what none of its
# costs is below; the cost of merging it with its partner.
COUNT = tl.constexpr(0)
KEY_SQUARE = tl.constexpr(1)
VALUE_SQUARE = tl.constexpr(2)
BOUND = tl.constexpr(3)
COST = tl.constexpr(4)
SHARED = tl.constexpr(5)
NUM_FIELDS = tl.constexpr(6)
# Entries of SHARED: w^2 / s_v, what counts as a tie, and the bound up to which items are looked at.
FACTOR = tl.constexpr(0)
TIED = tl.constexpr(1)
LIMIT = tl.constexpr(2)


@triton.jit(do_not_specialize=["previous", "current", "base", "num_next", "gone_base"])
def advance_items(
    k, v, slots, key_sum, value_sum, count, table, snap_keys, snap_values, snap_bias,
    gone_slot, gone_into, gone_count, gone_keys, gone_values, gone_weight,
    token_weights, weight, kept_slot, kept_keys, kept_values, kept_weight, item_keys, item_values, nums,
    previous, current, base, num_next, gone_base, W, C, H, K, V, M, L,
    HAS_PREVIOUS: tl.constexpr, HAS_NEXT: tl.constexpr, HAS_READ: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """`advance` of `recurrence.py` for rules that merge pairs; grid (streams, blocks of slots).

    Slots that the previous chunk merged into others leave first; what was in them and the tokens are then
    added in order of position. In the place of scores, the means are written as items.

    Args:
        gone_slot: `[entries, H, C]` int32 slots merged into others; -1 after the last. gone_into: the slots
            that they were merged into. gone_count: `[entries, H, C]`, and gone_keys: `[entries, H, C, K]`,
            what was in them. gone_values, gone_weight: likewise.
        token_weights, weight: as in `advance`.
        kept_slot: `[entries, H, C]` int32 the slots that each chunk adds to; -1 after the last. kept_keys:
            `[entries, H, C, K]` receives them as they were before. kept_values, kept_weight: likewise.
        item_keys: `[streams, L, K]` float32, receives the means. item_values: likewise.
        nums: the table of numbers, receives the squared lengths.
        gone_base: the entry that `gone_slot` starts with.
    """
    stream = tl.program_id(0)
    block = tl.program_id(1)
    row = stream // H
    head = stream % H
    previous, current, base = number(previous), number(current), number(base)
    gone_base = number(gone_base)
    slot = block * BN + tl.arange(0, BN)
    place = stream.to(tl.int64) * M + slot
    num_open = 0
    if HAS_PREVIOUS:
        num_open = tl.load(table + (previous + row) * COLUMNS + AFTER)
    else:
        num_open = tl.load(table + (current + row) * COLUMNS + BEFORE)
    if block * BN < num_open:
        is_in = slot < M
        counts = tl.load(count + place, mask=is_in, other=0)
        key_sums = rows(key_sum, place, is_in, K, BK)
        value_sums = rows(value_sum, place, is_in, V, BV)
        mass = counts
        if weight is not None:
            mass = tl.load(weight + place, mask=is_in, other=0.0)
        if HAS_PREVIOUS:
            entry = previous + row
            if tl.load(table + entry * COLUMNS + IS_COMPLETE) != 0:
                chunk = tl.load(table + entry * COLUMNS + CHUNK).to(tl.int64)
                gone = ((entry - gone_base).to(tl.int64) * H + head) * C
                before = counts
                if kept_keys is not None:
                    p = place_of(slot, kept_slot + gone, BT, C)
                    keep_rows(
                        kept_keys, kept_values, kept_weight, gone, p, C, key_sums, value_sums, mass, K, V, BK,
                        BV,
                    )  # fmt: skip
                is_gone = place_of(slot, gone_slot + gone, BT, C) < C
                key_sums = tl.where(is_gone[:, None], 0.0, key_sums)
                value_sums = tl.where(is_gone[:, None], 0.0, value_sums)
                counts = tl.where(is_gone, 0, counts)
                key_sums, _ = add_tokens(
                    key_sums, counts, slot, gone_keys, gone_into + gone, gone, 1, C, K, 1, BT, BK, gone_count
                )
                value_sums, counts = add_tokens(
                    value_sums,
                    counts,
                    slot,
                    gone_values,
                    gone_into + gone,
                    gone,
                    1,
                    C,
                    V,
                    1,
                    BT,
                    BV,
                    gone_count,
                )
                chosen = slots + (chunk * H + head) * W
                first = chunk * W * H + head
                key_sums, _ = add_tokens(
                    key_sums, counts, slot, k, chosen, first, H, C, K, 1, BT, BK, None, token_weights
                )
                value_sums, counts = add_tokens(
                    value_sums, counts, slot, v, chosen, first, H, C, V, 1, BT, BV, None, token_weights
                )
                is_changed = is_in & (is_gone | (counts != before))
                if weight is None:
                    mass = counts
                else:
                    mass = tl.where(is_gone, 0.0, mass)
                    mass = add_weights(mass, slot, gone_weight, gone_into + gone, gone, 1, C, BT)
                    mass = add_weights(mass, slot, token_weights, chosen, first, H, C, BT)
                    tl.store(weight + place, mass, mask=is_changed)
                put_rows(key_sum, place, key_sums, is_changed, K, BK)
                put_rows(value_sum, place, value_sums, is_changed, V, BV)
                tl.store(count + place, counts, mask=is_changed)
        if HAS_NEXT:
            if row < num_next:
                entry = current + row
                num = tl.load(table + entry * COLUMNS + BEFORE)
                is_used = slot < num
                mean_keys, mean_values = means(key_sums, mass), means(value_sums, mass)
                if HAS_READ:
                    shown = ((entry - base).to(tl.int64) * H + head) * M + slot
                    put_rows(snap_keys, shown, mean_keys, is_used, K, BK)
                    put_rows(snap_values, shown, mean_values, is_used, V, BV)
                    tl.store(snap_bias + shown, log2_mass(mass), mask=is_used)
                if tl.load(table + entry * COLUMNS + IS_COMPLETE) != 0:
                    nums += stream.to(tl.int64) * NUM_FIELDS * L
                    put_items(
                        item_keys, item_values, nums, stream, slot, mean_keys, mean_values, is_used, K, V, L,
                        BK, BV,
                    )  # fmt: skip
                    tl.store(nums + L * COUNT + slot, mass.to(tl.float64), mask=is_used)


@triton.jit
def put_items(
    item_keys, item_values, nums, stream, column, keys, values, mask, K, V, L, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Write means `[N, BK]` and `[N, BV]` of columns in float32, and their squared lengths."""
    place = stream.to(tl.int64) * L + column
    put_rows(item_keys, place, keys, mask, K, BK)
    put_rows(item_values, place, values, mask, V, BV)
    keys, values = keys.to(tl.float64), values.to(tl.float64)
    tl.store(nums + L * KEY_SQUARE + column, tl.sum(keys * keys, 1), mask=mask)
    tl.store(nums + L * VALUE_SQUARE + column, tl.sum(values * values, 1), mask=mask)


@triton.jit
def _are_unusual(squares):
    """Which squared lengths are of vectors too short or too long for float32 products, or not finite."""
    is_ordinary = (squares >= SHORTEST * SHORTEST) & (squares <= LONGEST * LONGEST)
    return (is_ordinary | (squares == 0)) == 0


@triton.jit(do_not_specialize=["current", "PS"])
def prepare(
    k, v, token_weights, table, item_keys, item_values, ints, nums, current, factor, W, C, H, K, V, L, PS,
    BC: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Lay out the items of a complete chunk; grid (streams,).

    Args:
        k: `[num_chunks, W, H, K]` keys. v: values.
        token_weights: `[num_chunks, W, H]` weights of tokens; None without.
        factor: `[1]` float64, w^2.
        PS: column of the first token.
        BL: L, rounded up to a power of two.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    ints += stream.to(tl.int64) * INT_FIELDS * L
    nums += stream.to(tl.int64) * NUM_FIELDS * L
    entry = table + (number(current) + row) * COLUMNS
    chunk = tl.load(entry + CHUNK).to(tl.int64)
    num = tl.load(entry + BEFORE)
    for start in range(0, C, BC):
        t = start + tl.arange(0, BC)
        place = (chunk * W + t) * H + head
        keys = rows(k, place, t < C, K, BK).to(tl.float32)
        values = rows(v, place, t < C, V, BV).to(tl.float32)
        if token_weights is not None:
            # A weight of zero leaves no trace of what is not finite.
            is_traced = (tl.load(token_weights + place, mask=t < C, other=0.0) > 0)[:, None]
            keys = tl.where(is_traced | (tl.abs(keys) < float("inf")), keys, 0.0)
            values = tl.where(is_traced | (tl.abs(values) < float("inf")), values, 0.0)
        put_items(item_keys, item_values, nums, stream, PS + t, keys, values, t < C, K, V, L, BK, BV)
    tl.debug_barrier()
    i = tl.arange(0, BL)
    is_slot = i < num
    is_token = (i >= PS) & (i < PS + C)
    is_there = is_slot | is_token
    counts = tl.load(nums + L * COUNT + i, mask=is_slot, other=1.0)
    if token_weights is not None:
        own = tl.load(token_weights + (chunk * W + i - PS) * H + head, mask=is_token, other=0.0)
        counts = tl.where(is_token, own.to(tl.float64), counts)
    key_squares = tl.load(nums + L * KEY_SQUARE + i, mask=is_there, other=0.0)
    value_squares = tl.load(nums + L * VALUE_SQUARE + i, mask=is_there, other=0.0)
    # The mean squared length of values, of items whose values are finite.
    has_length = is_there & (value_squares < float("inf"))
    total = tl.sum(tl.where(has_length, counts, 0.0), 0)
    power = tl.sum(tl.where(has_length, counts * value_squares, 0.0), 0) / tl.where(total > 0, total, 1.0)
    factor = tl.where(power > 0, tl.load(factor) / tl.where(power > 0, power, 1.0), 0.0)
    squares = key_squares + factor * value_squares
    longest = tl.max(tl.where(is_there & (squares < float("inf")), squares, 0.0), 0)
    is_unusual = (
        _are_unusual(key_squares) | _are_unusual(value_squares) | _are_unusual(factor * value_squares)
    )
    is_wide = tl.max((is_there & is_unusual).to(tl.int32), 0)
    is_wide = tl.maximum(
        is_wide, ((factor > 0) & ((factor < SHORTEST * SHORTEST) | (factor > LONGEST * LONGEST))).to(tl.int32)
    )
    shared = nums + L * SHARED
    tl.store(shared + FACTOR, factor)
    tl.store(shared + TIED, longest * TIE)
    # Below all bounds: nothing is known yet but them.
    tl.store(shared + LIMIT, -1.0)
    control = ints + L * CONTROL
    due = num + C - tl.load(entry + AFTER)
    tl.store(control + LEFT, due)
    tl.store(control + MERGED, 0)
    tl.store(control + NUM_LISTED, tl.where(due > 0, num + C, 0))
    tl.store(control + IS_WIDE, is_wide)
    tl.store(control + NUM_SLOTS, num)
    tl.store(nums + L * COUNT + i, counts, mask=is_token)
    tl.store(nums + L * BOUND + i, 0.0 * counts, mask=is_there)
    tl.store(ints + L * INTO + i, tl.where(is_there, i, -1), mask=i < L)
    tl.store(ints + L * INDEX + i, i, mask=i < L)
    tl.store(ints + L * PARTNER + i, -1 + 0 * i, mask=i < L)
    tl.store(ints + L * SINCE + i, 0 * i, mask=i < L)
    tl.store(ints + L * LISTED + tl.where(is_slot, i, num + i - PS), i, mask=is_there)


@triton.jit
def _root(into, column, mask):
    """The column that each of `column` `[N]` has ended in."""
    root = column
    above = tl.load(into + root, mask=mask, other=0)
    while tl.max((mask & (above != root)).to(tl.int32), 0) > 0:
        root = tl.where(mask, above, root)
        above = tl.load(into + root, mask=mask, other=0)
    return root


@triton.jit(do_not_specialize=["current", "gone_base", "PS"])
def settle(
    table, ints, count, weight, slots, gone_slot, gone_into, gone_count, gone_weight, kept_slot,
    current, gone_base, W, C, H, M, L, PS, BL: tl.constexpr,
):  # fmt: skip
    """Say which slot each token goes to, and which slots leave; grid (streams,).

    A cluster stays in its lowest slot. One of tokens alone takes a slot that became free, or a new slot, in
    the order of their first tokens.

    Args:
        slots: `[num_chunks, H, W]` receives the slots of the tokens.
        gone_slot, gone_into, gone_count, gone_weight: `[entries, H, C]` as in `advance_items`, receive the
            slots that leave. kept_slot: likewise, those that take in others.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    ints += stream.to(tl.int64) * INT_FIELDS * L
    entry = table + (number(current) + row) * COLUMNS
    chunk = tl.load(entry + CHUNK).to(tl.int64)
    num, after = tl.load(entry + BEFORE), tl.load(entry + AFTER)
    i = tl.arange(0, BL)
    is_slot = i < num
    is_token = (i >= PS) & (i < PS + C)
    is_there = is_slot | is_token
    into = ints + L * INTO
    lowest = tl.load(ints + L * INDEX + _root(into, i, is_there), mask=is_there, other=-1)
    # Free slots in order, then the clusters that take them.
    free = ints + L * MEMBER
    home = ints + L * OWNER
    is_free = (i < after) & ((i >= num) | (lowest != i))
    tl.store(free + tl.cumsum(is_free.to(tl.int32), 0) - 1, i, mask=is_free)
    tl.debug_barrier()
    is_new = is_token & (lowest == i)
    taken = tl.load(free + tl.cumsum(is_new.to(tl.int32), 0) - 1, mask=is_new, other=0)
    tl.store(home + i, tl.where(is_new, taken, i), mask=is_there)
    tl.debug_barrier()
    chosen = tl.load(home + lowest, mask=is_token, other=0)
    tl.store(slots + (chunk * H + head) * W + i - PS, chosen, mask=is_token)
    gone = ((number(current) + row - number(gone_base)).to(tl.int64) * H + head) * C
    is_gone = is_slot & (lowest != i)
    p = gone + tl.cumsum(is_gone.to(tl.int32), 0) - 1
    tl.store(gone_slot + p, i, mask=is_gone)
    tl.store(gone_into + p, lowest, mask=is_gone)
    counts = tl.load(count + stream.to(tl.int64) * M + i, mask=is_gone, other=0)
    tl.store(gone_count + p, counts, mask=is_gone)
    if weight is not None:
        own = tl.load(weight + stream.to(tl.int64) * M + i, mask=is_gone, other=0.0)
        tl.store(gone_weight + p, own, mask=is_gone)
    is_rest = (i < C) & (i >= tl.sum(is_gone.to(tl.int32), 0))
    tl.store(gone_slot + gone + i, -1 + 0 * i, mask=is_rest)
    tl.store(gone_into + gone + i, -1 + 0 * i, mask=is_rest)
    if kept_slot is not None:
        has_more = ints + L * ORDINAL
        tl.store(has_more + i, 0 * i, mask=i < L)
        tl.debug_barrier()
        tl.store(has_more + lowest, 1 + 0 * i, mask=is_there & (lowest != i))
        tl.debug_barrier()
        # Each takes a merge, so there are no more than tokens.
        is_changed = is_slot & (lowest == i) & (tl.load(has_more + i, mask=is_slot, other=0) > 0)
        tl.store(kept_slot + gone + tl.cumsum(is_changed.to(tl.int32), 0) - 1, i, mask=is_changed)
        is_rest = (i < C) & (i >= tl.sum(is_changed.to(tl.int32), 0))
        tl.store(kept_slot + gone + i, -1 + 0 * i, mask=is_rest)


@triton.jit(do_not_specialize=["current", "gone_base"])
def keep(
    key_sum, value_sum, gone_slot, gone_keys, gone_values, current, gone_base, C, H, K, V, M,
    BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Keep the sums of slots that leave; grid (streams, blocks of such slots)."""
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    p = tl.program_id(1) * BN + tl.arange(0, BN)
    place = ((number(current) + row - number(gone_base)).to(tl.int64) * H + head) * C + p
    slot = tl.load(gone_slot + place, mask=p < C, other=-1)
    is_gone = slot >= 0
    if tl.max(is_gone.to(tl.int32), 0) > 0:
        source = stream.to(tl.int64) * M + slot
        put_rows(gone_keys, place, rows(key_sum, source, is_gone, K, BK), is_gone, K, BK)
        put_rows(gone_values, place, rows(value_sum, source, is_gone, V, BV), is_gone, V, BV)
