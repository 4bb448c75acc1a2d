"""Kernels of the rules that merge pairs: items (slots and tokens) of a chunk, and the sums of slots.

Items are *columns* `[slots | tokens]`, described by their means, their masses in float64 and a table of
integers. `merging.py` launches the kernels, and writes to `INTO` of each column the lowest column of its
cluster.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import (
    AFTER,
    BEFORE,
    CHUNK,
    COLUMNS,
    IS_COMPLETE,
    log2_mass,
    means,
    place_of,
    put_rows,
    rows,
    traced,
)
from ovq.ops.backends.triton.formats import in_format
from ovq.ops.backends.triton.recurrence import add_tokens, keep_rows

# Fields of `ints`, the table of a stream; field F of column i is at F * L + i, for L columns. INTO: lowest
# column of the cluster, or -1 for an unused column. Scratch of `settle`: free slots in order, slot of each
# cluster, whether the cluster has more than one item.
INTO = tl.constexpr(0)
FREE = tl.constexpr(1)
HOME = tl.constexpr(2)
HAS_MORE = tl.constexpr(3)
INT_FIELDS = tl.constexpr(4)


@triton.jit(do_not_specialize=["previous", "current", "base", "num_next", "merged_base"])
def advance_items(
    k, v, slots, key_sum, value_sum, count, table, snap_keys, snap_values, snap_bias,
    merged_slot, merged_into, merged_count, merged_keys, merged_values, merged_weight,
    token_weights, weight, kept_slot, kept_keys, kept_values, kept_weight, item_keys, item_values, masses,
    previous, current, base, num_next, merged_base, W, C, H, K, V, M, L,
    HAS_PREVIOUS: tl.constexpr, HAS_NEXT: tl.constexpr, HAS_READ: tl.constexpr, FORMAT: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """`advance` of `recurrence.py` for rules that merge pairs; grid (streams, blocks of slots).

    Slots that the previous chunk merged into others are cleared first; then their contents and the tokens are
    added in order of position. Instead of scores, the means are written as items.

    Args:
        merged_slot: `[entries, H, C]` int32 slots merged into others, -1 after the last. merged_into: the
            slots that they were merged into. merged_count: `[entries, H, C]` counts of the merged slots.
            merged_keys: `[entries, H, C, K]` their sums. merged_values, merged_weight: likewise.
        token_weights, weight: as in `advance`.
        kept_slot: `[entries, H, C]` int32 slots that each chunk adds to, -1 after the last. kept_keys:
            `[entries, H, C, K]` receives their sums before the chunk. kept_values, kept_weight: likewise.
        item_keys: `[streams, L, K]` float32, receives the means. item_values: likewise.
        masses: `[streams, L]` float64, receives counts or weights.
        merged_base: first entry of `merged_slot`.
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
                merged_at = ((entry - merged_base).to(tl.int64) * H + head) * C
                before = counts
                if kept_keys is not None:
                    p = place_of(slot, kept_slot + merged_at, BT, C)
                    keep_rows(
                        kept_keys, kept_values, kept_weight, merged_at, p, C, key_sums, value_sums, mass, K,
                        V, BK, BV,
                    )  # fmt: skip
                is_merged = place_of(slot, merged_slot + merged_at, BT, C) < C
                key_sums = tl.where(is_merged[:, None], 0.0, key_sums)
                value_sums = tl.where(is_merged[:, None], 0.0, value_sums)
                counts = tl.where(is_merged, 0, counts)
                into = merged_into + merged_at
                merged_mass = merged_count
                if weight is not None:
                    merged_mass = merged_weight
                    mass = tl.where(is_merged, 0.0, mass)
                else:
                    mass = counts
                key_sums, mass = add_tokens(
                    key_sums, mass, slot, merged_keys, into, merged_at, 1, C, K, 1, BT, BK, merged_mass
                )
                value_sums, counts = add_tokens(
                    value_sums, counts, slot, merged_values, into, merged_at, 1, C, V, 1, BT, BV, merged_count
                )
                chosen = slots + (chunk * H + head) * W
                first = chunk * W * H + head
                key_sums, mass = add_tokens(
                    key_sums, mass, slot, k, chosen, first, H, C, K, 1, BT, BK, token_weights, token_weights
                )
                value_sums, counts = add_tokens(
                    value_sums, counts, slot, v, chosen, first, H, C, V, 1, BT, BV, None, token_weights
                )
                key_sums = in_format(key_sums, mass, FORMAT, HAS_MEANS)
                value_sums = in_format(value_sums, mass, FORMAT, HAS_MEANS)
                is_changed = is_in & (is_merged | (counts != before))
                if weight is not None:
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
                    snap_at = ((entry - base).to(tl.int64) * H + head) * M + slot
                    put_rows(snap_keys, snap_at, mean_keys, is_used, K, BK)
                    put_rows(snap_values, snap_at, mean_values, is_used, V, BV)
                    tl.store(snap_bias + snap_at, log2_mass(mass), mask=is_used)
                if tl.load(table + entry * COLUMNS + IS_COMPLETE) != 0:
                    column = stream.to(tl.int64) * L + slot
                    put_rows(item_keys, column, mean_keys, is_used, K, BK)
                    put_rows(item_values, column, mean_values, is_used, V, BV)
                    tl.store(masses + column, mass.to(tl.float64), mask=is_used)


@triton.jit(do_not_specialize=["current", "PS"])
def prepare(
    k, v, token_weights, table, item_keys, item_values, ints, masses, current, W, C, H, K, V, L, PS,
    BC: tl.constexpr, BL: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Write the tokens of a complete chunk as items and initialise `INTO`; grid (streams,).

    Args:
        k: `[num_chunks, W, H, K]` keys. v: values.
        token_weights: `[num_chunks, W, H]` weights of tokens, or None.
        PS: column of the first token.
        BL: L, rounded up to a power of two.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    columns = stream.to(tl.int64) * L
    entry = table + (current + row) * COLUMNS
    chunk = tl.load(entry + CHUNK).to(tl.int64)
    for start in range(0, C, BC):
        t = start + tl.arange(0, BC)
        place = (chunk * W + t) * H + head
        keys = rows(k, place, t < C, K, BK).to(tl.float32)
        values = rows(v, place, t < C, V, BV).to(tl.float32)
        mass = 1.0 + 0.0 * t
        if token_weights is not None:
            mass = tl.load(token_weights + place, mask=t < C, other=0.0)
            # Non-finite entries of tokens of weight 0 must leave no trace.
            keys, values = traced(keys, mass), traced(values, mass)
        column = columns + PS + t
        put_rows(item_keys, column, keys, t < C, K, BK)
        put_rows(item_values, column, values, t < C, V, BV)
        tl.store(masses + column, mass.to(tl.float64), mask=t < C)
    i = tl.arange(0, BL)
    is_there = (i < tl.load(entry + BEFORE)) | ((i >= PS) & (i < PS + C))
    tl.store(ints + INT_FIELDS * columns + L * INTO + i, tl.where(is_there, i, -1), mask=i < L)


@triton.jit(do_not_specialize=["current", "merged_base", "PS"])
def settle(
    table, ints, count, weight, slots, merged_slot, merged_into, merged_count, merged_weight, kept_slot,
    current, merged_base, W, C, H, M, L, PS, BL: tl.constexpr,
):  # fmt: skip
    """Assign tokens to slots and list the slots merged into others; grid (streams,).

    A cluster stays in its lowest slot. Clusters without slots take freed slots, then new ones, in the order
    of their first tokens.

    Args:
        slots: `[num_chunks, H, W]` receives the slots of the tokens.
        merged_slot, merged_into, merged_count, merged_weight: `[entries, H, C]` as in `advance_items`,
            receive the merged slots. kept_slot: likewise, the slots that absorb other items.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    ints += stream.to(tl.int64) * INT_FIELDS * L
    entry = table + (current + row) * COLUMNS
    chunk = tl.load(entry + CHUNK).to(tl.int64)
    num, after = tl.load(entry + BEFORE), tl.load(entry + AFTER)
    i = tl.arange(0, BL)
    is_slot = i < num
    is_token = (i >= PS) & (i < PS + C)
    is_there = is_slot | is_token
    lowest = tl.load(ints + L * INTO + i, mask=is_there, other=-1)
    # Free slots in order, then the clusters that take them.
    free = ints + L * FREE
    home = ints + L * HOME
    is_free = (i < after) & ((i >= num) | (lowest != i))
    tl.store(free + tl.cumsum(is_free.to(tl.int32), 0) - 1, i, mask=is_free)
    tl.debug_barrier()
    is_new = is_token & (lowest == i)
    taken = tl.load(free + tl.cumsum(is_new.to(tl.int32), 0) - 1, mask=is_new, other=0)
    tl.store(home + i, tl.where(is_new, taken, i), mask=is_there)
    tl.debug_barrier()
    chosen = tl.load(home + lowest, mask=is_token, other=0)
    tl.store(slots + (chunk * H + head) * W + i - PS, chosen, mask=is_token)
    merged_at = ((current + row - merged_base).to(tl.int64) * H + head) * C
    is_merged = is_slot & (lowest != i)
    p = merged_at + tl.cumsum(is_merged.to(tl.int32), 0) - 1
    tl.store(merged_slot + p, i, mask=is_merged)
    tl.store(merged_into + p, lowest, mask=is_merged)
    counts = tl.load(count + stream.to(tl.int64) * M + i, mask=is_merged, other=0)
    tl.store(merged_count + p, counts, mask=is_merged)
    if weight is not None:
        own = tl.load(weight + stream.to(tl.int64) * M + i, mask=is_merged, other=0.0)
        tl.store(merged_weight + p, own, mask=is_merged)
    is_rest = (i < C) & (i >= tl.sum(is_merged.to(tl.int32), 0))
    tl.store(merged_slot + merged_at + i, -1 + 0 * i, mask=is_rest)
    tl.store(merged_into + merged_at + i, -1 + 0 * i, mask=is_rest)
    if kept_slot is not None:
        has_more = ints + L * HAS_MORE
        tl.store(has_more + i, 0 * i, mask=i < L)
        tl.debug_barrier()
        tl.store(has_more + lowest, 1 + 0 * i, mask=is_there & (lowest != i))
        tl.debug_barrier()
        # Each of these slots takes at least one merge, so there are at most C.
        is_changed = is_slot & (lowest == i) & (tl.load(has_more + i, mask=is_slot, other=0) > 0)
        tl.store(kept_slot + merged_at + tl.cumsum(is_changed.to(tl.int32), 0) - 1, i, mask=is_changed)
        is_rest = (i < C) & (i >= tl.sum(is_changed.to(tl.int32), 0))
        tl.store(kept_slot + merged_at + i, -1 + 0 * i, mask=is_rest)


@triton.jit(do_not_specialize=["current", "merged_base"])
def keep(
    key_sum, value_sum, merged_slot, merged_keys, merged_values, current, merged_base, C, H, K, V, M,
    BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Copy the sums of slots merged into others; grid (streams, blocks of such slots)."""
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    p = tl.program_id(1) * BN + tl.arange(0, BN)
    place = ((current + row - merged_base).to(tl.int64) * H + head) * C + p
    slot = tl.load(merged_slot + place, mask=p < C, other=-1)
    is_merged = slot >= 0
    if tl.max(is_merged.to(tl.int32), 0) > 0:
        source = stream.to(tl.int64) * M + slot
        put_rows(merged_keys, place, rows(key_sum, source, is_merged, K, BK), is_merged, K, BK)
        put_rows(merged_values, place, rows(value_sum, source, is_merged, V, BV), is_merged, V, BV)
