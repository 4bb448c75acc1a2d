"""Backward through a segment: restores the dictionaries that its chunks read and accumulates their gradients.

With known assignments, slots are independent of each other: one program takes a block of slots through all
chunks of the segment, and no program waits for another. With rules that merge pairs, a slot that was merged
into another gets the gradient of that one, which another program may own; `deposit` then takes one launch per
chunk.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import (
    BEFORE,
    CHUNK,
    COLUMNS,
    IS_COMPLETE,
    log2_mass,
    means,
    place_of,
    put_rows,
    rows,
)
from ovq.ops.backends.triton.recurrence import add_tokens


@triton.jit
def _restored(total, mass, kept_rows, kept_mass, place, p, C, D, BD: tl.constexpr):
    """Slots restored from the copies at places `p` of a chunk; slots with p = C are unchanged."""
    kept = rows(kept_rows, place + p, p < C, D, BD)
    own = tl.load(kept_mass + place + p, mask=p < C, other=0)
    return tl.where((p < C)[:, None], kept, total), tl.where(p < C, own, mass)


@triton.jit(do_not_specialize=["start", "stop", "base"])
def rewind(
    x, slots, sums, mass, mass_before, table, first, num_active, snaps, snap_bias,
    merged_slot, merged_into, merged_mass, merged_rows, kept_slot, kept_mass, kept_rows,
    start, stop, base, W, C, H, D, M,
    HAS_BIAS: tl.constexpr, HAS_MERGED: tl.constexpr, BN: tl.constexpr, TB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Undo a segment's chunks in the sums of a block of slots, the last chunk first; grid (streams, blocks).

    Args:
        x: `[num_chunks, W, H, D]` keys, or values.
        slots: `[num_chunks, H, W]` int32.
        sums: `[R, H, M, D]` sums after the segment; on return, before it.
        mass: `[R, H, M]` counts, or weights, after the segment. mass_before: receives those before it.
        first: `[steps + 1]` int32 first entry of each step. num_active: `[steps]` number of rows with a chunk
            at the step.
        snaps: `[entries, H, M, D]` receives the means that each chunk read.
        snap_bias: `[entries, H, M]` receives the log2 of counts or weights (HAS_BIAS).
        merged_slot: `[entries, H, C]` slots merged into others, of all chunks (HAS_MERGED). merged_into,
            merged_mass: likewise, as in `merging.MergedSlots`. merged_rows: `[entries, H, C, D]`.
        kept_rows: `[entries, H, C, D]` with token weights, copies of changed slots from before each chunk: of
            the slots kept_slot `[entries, H, C]`, or if that is None, at the position of a slot's first
            token. kept_mass: likewise.
        start: first step of the segment. stop: step after the last one. base: first entry of the segment.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    slot = tl.program_id(1) * BN + tl.arange(0, BN)
    is_in = slot < M
    place = stream.to(tl.int64) * M + slot
    own_mass = tl.load(mass + place, mask=is_in, other=0)
    total = rows(sums, place, is_in, D, BD)
    for back in range(0, stop - start):
        step = stop - 1 - back
        if row < tl.load(num_active + step):
            entry = tl.load(first + step) + row
            chunk = tl.load(table + entry * COLUMNS + CHUNK).to(tl.int64)
            num = tl.load(table + entry * COLUMNS + BEFORE)
            if tl.load(table + entry * COLUMNS + IS_COMPLETE) != 0:
                chosen = slots + (chunk * H + head) * W
                local = (entry.to(tl.int64) * H + head) * C
                if kept_rows is None:
                    total, own_mass = add_tokens(
                        total, own_mass, slot, x, chosen, chunk * W * H + head, H, C, D, -1, TB, BD
                    )
                    if HAS_MERGED:
                        total, own_mass = add_tokens(
                            total, own_mass, slot, merged_rows, merged_into + local, local, 1, C, D, -1, TB,
                            BD, merged_mass,
                        )  # fmt: skip
                else:
                    p = place_of(slot, chosen if kept_slot is None else kept_slot + local, TB, C)
                    total, own_mass = _restored(total, own_mass, kept_rows, kept_mass, local, p, C, D, BD)
                if HAS_MERGED:
                    p = place_of(slot, merged_slot + local, TB, C)
                    total, own_mass = _restored(total, own_mass, merged_rows, merged_mass, local, p, C, D, BD)
                # Slots that the chunk opened contain only rounding errors now.
                total = tl.where((slot < num)[:, None], total, 0.0)
                own_mass = tl.where(slot < num, own_mass, 0)
            snap_at = ((entry - base).to(tl.int64) * H + head) * M + slot
            put_rows(snaps, snap_at, means(total, own_mass), slot < num, D, BD)
            if HAS_BIAS:
                tl.store(snap_bias + snap_at, log2_mass(own_mass), mask=slot < num)
    put_rows(sums, place, total, is_in, D, BD)
    tl.store(mass_before + place, own_mass, mask=is_in)


@triton.jit
def _scatter(out, place, total, slot, slots, C, D, TB: tl.constexpr, BD: tl.constexpr):
    """Write the gradient `total` of each slot to those of C rows of `out` that `slots` assigns to it."""
    for tokens_from in range(0, C, TB):
        t = tokens_from + tl.arange(0, TB)
        own = tl.load(slots + t, mask=t < C, other=-1)
        is_mine = own[None, :] == slot[:, None]
        token = tl.min(tl.where(is_mine, t[None, :], C), 1)
        while tl.min(token, 0) < C:
            put_rows(out, place + token, total, token < C, D, BD)
            token = tl.min(tl.where(is_mine & (t[None, :] > token[:, None]), t[None, :], C), 1)


@triton.jit(do_not_specialize=["start", "stop", "base"])
def deposit(
    slots, accumulated, table, first, num_active, grads, deposits, merged_slot, merged_into, passed,
    start, stop, base, W, C, H, D, M,
    HAS_MERGED: tl.constexpr, BN: tl.constexpr, TB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Accumulate the gradient of a block's sums, chunk by chunk from the last; grid (streams, blocks).

    If slots were merged into others (HAS_MERGED), a launch processes one step and first completes the
    previous launch: a merged slot gets the gradient passed on by the program of the slot it was merged into.

    Args:
        slots: `[num_chunks, H, W]` int32.
        accumulated: `[R, H, M, D]` float32 gradient of the sums after the segment; on return, before it.
        grads: `[entries, H, M, D]` float32 contributions of each chunk's queries.
        deposits: `[entries, H, W, D]` float32, receives the gradient of the sum that each token of a complete
            chunk was added to.
        merged_slot, merged_into: as in `rewind`.
        passed: `[2, streams, C, D]` float32 gradients for merged slots, of even and odd steps.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    slot = tl.program_id(1) * BN + tl.arange(0, BN)
    is_in = slot < M
    place = stream.to(tl.int64) * M + slot
    total = rows(accumulated, place, is_in, D, BD)
    streams = tl.num_programs(0).to(tl.int64)
    if HAS_MERGED:
        if row < tl.load(num_active + stop):
            entry = tl.load(first + stop) + row
            if tl.load(table + entry * COLUMNS + IS_COMPLETE) != 0:
                p = place_of(slot, merged_slot + (entry.to(tl.int64) * H + head) * C, TB, C)
                total += rows(passed, (stop % 2 * streams + stream) * C + p, p < C, D, BD)
    for back in range(0, stop - start):
        step = stop - 1 - back
        if row < tl.load(num_active + step):
            entry = tl.load(first + step) + row
            chunk = tl.load(table + entry * COLUMNS + CHUNK).to(tl.int64)
            num = tl.load(table + entry * COLUMNS + BEFORE)
            local = (entry - base).to(tl.int64) * H + head
            if tl.load(table + entry * COLUMNS + IS_COMPLETE) != 0:
                _scatter(deposits, local * W, total, slot, slots + (chunk * H + head) * W, C, D, TB, BD)
                if HAS_MERGED:
                    merged_at = (entry.to(tl.int64) * H + head) * C
                    to = (step % 2 * streams + stream) * C
                    _scatter(passed, to, total, slot, merged_into + merged_at, C, D, TB, BD)
                    is_merged = place_of(slot, merged_slot + merged_at, TB, C) < C
                    total = tl.where(is_merged[:, None], 0.0, total)
            # The gradient of slots that the chunk opened ends here, as no earlier chunk read them.
            is_used = slot < num
            total = tl.where(is_used[:, None], total + rows(grads, local * M + slot, is_used, D, BD), 0.0)
    put_rows(accumulated, place, total, is_in, D, BD)
