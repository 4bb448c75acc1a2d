"""Going back through a segment: the dictionaries that its chunks read, and the gradients of their sums.

With the slots of all tokens known, slots are independent of each other: one program takes a block of slots
through all chunks of the segment, and no program waits for another.
"""

import triton
import triton.language as tl

from ovq.ops.backends.triton.common import BEFORE, CHUNK, COLUMNS, IS_COMPLETE, means, put_rows, rows
from ovq.ops.backends.triton.recurrence import add_tokens


@triton.jit(do_not_specialize=["start", "stop", "base"])
def rewind(
    x, slots, sums, count, count_before, table, first, num_active, snaps, snap_bias, start, stop, base, W, C,
    H, D, M, HAS_BIAS: tl.constexpr, BN: tl.constexpr, TB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Take a segment's chunks out of the sums of a block of slots, the last first; grid (streams, blocks).

    Args:
        x: `[num_chunks, W, H, D]` keys, or values.
        slots: `[num_chunks, H, W]` int32.
        sums: `[R, H, M, D]` after the segment; before it on return.
        count: `[R, H, M]` after the segment. count_before: receives the counts before it.
        first: `[steps + 1]` int32 first entry of each step. num_active: `[steps]` rows with a chunk at the
            step.
        snaps: `[entries, H, M, D]` receives the means that each chunk read.
        snap_bias: `[entries, H, M]` receives the log2 counts (HAS_BIAS).
        start: first step of the segment. stop: step after its last. base: its first entry.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    slot = tl.program_id(1) * BN + tl.arange(0, BN)
    is_in = slot < M
    place = stream.to(tl.int64) * M + slot
    counts = tl.load(count + place, mask=is_in, other=0)
    total = rows(sums, place, is_in, D, BD)
    for back in range(0, stop - start):
        step = stop - 1 - back
        if row < tl.load(num_active + step):
            entry = tl.load(first + step) + row
            chunk = tl.load(table + entry * COLUMNS + CHUNK).to(tl.int64)
            num = tl.load(table + entry * COLUMNS + BEFORE)
            if tl.load(table + entry * COLUMNS + IS_COMPLETE) != 0:
                chosen = slots + (chunk * H + head) * W
                total, counts = add_tokens(
                    total, counts, slot, x, chosen, chunk * W * H + head, H, C, D, -1, TB, BD
                )
                # In slots that the chunk opened, only rounding errors are left.
                total = tl.where((slot < num)[:, None], total, 0.0)
            shown = ((entry - base).to(tl.int64) * H + head) * M + slot
            put_rows(snaps, shown, means(total, counts), slot < num, D, BD)
            if HAS_BIAS:
                bias = tl.log2(tl.maximum(counts, 1).to(tl.float32))
                tl.store(snap_bias + shown, bias, mask=slot < num)
    put_rows(sums, place, total, is_in, D, BD)
    tl.store(count_before + place, counts, mask=is_in)


@triton.jit(do_not_specialize=["start", "stop", "base"])
def deposit(
    slots, accumulated, table, first, num_active, grads, deposits, start, stop, base, W, C, H, D, M,
    BN: tl.constexpr, TB: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Accumulate the gradient of a block's sums, chunk by chunk from the last; grid (streams, blocks).

    Args:
        slots: `[num_chunks, H, W]` int32.
        accumulated: `[R, H, M, D]` float32 gradient of the sums after the segment; before it on return.
        grads: `[entries, H, M, D]` float32, the contribution of each chunk's queries.
        deposits: `[entries, H, W, D]` float32, the gradient that each token of a complete chunk gets from its
            sum.
    """
    stream = tl.program_id(0)
    row = stream // H
    head = stream % H
    slot = tl.program_id(1) * BN + tl.arange(0, BN)
    is_in = slot < M
    place = stream.to(tl.int64) * M + slot
    total = rows(accumulated, place, is_in, D, BD)
    for back in range(0, stop - start):
        step = stop - 1 - back
        if row < tl.load(num_active + step):
            entry = tl.load(first + step) + row
            chunk = tl.load(table + entry * COLUMNS + CHUNK).to(tl.int64)
            num = tl.load(table + entry * COLUMNS + BEFORE)
            local = (entry - base).to(tl.int64) * H + head
            if tl.load(table + entry * COLUMNS + IS_COMPLETE) != 0:
                for tokens_from in range(0, C, TB):
                    t = tokens_from + tl.arange(0, TB)
                    own = tl.load(slots + (chunk * H + head) * W + t, mask=t < C, other=-1)
                    is_mine = own[None, :] == slot[:, None]
                    token = tl.min(tl.where(is_mine, t[None, :], C), 1)
                    while tl.min(token, 0) < C:
                        put_rows(deposits, local * W + token, total, token < C, D, BD)
                        token = tl.min(tl.where(is_mine & (t[None, :] > token[:, None]), t[None, :], C), 1)
            # The gradient of slots that the chunk opened ends here: no earlier chunk has read them.
            is_used = slot < num
            total = tl.where(is_used[:, None], total + rows(grads, local * M + slot, is_used, D, BD), 0.0)
    put_rows(accumulated, place, total, is_in, D, BD)
