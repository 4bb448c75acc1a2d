"""Forward (with `chunk.py`) and backward over chunk-aligned rows: the order of the kernels.

Forward, for each step i of the recurrence: `advance` merges chunk i - 1 into the slots and scores the keys
of chunk i against them; `nearest` and `open_slots` assign those keys to slots. The dictionaries that queries
read are stored for a segment of several chunks, and `read` processes a whole segment at once.

Backward, for each segment from the last: `rewind` subtracts the chunks from the sums and stores the same
dictionaries again; `grad_queries` and `grad_slots` process all chunks at once; `deposit` accumulates the
gradient of the sums from the last chunk to the first; `grad_tokens` adds the gradients of tokens through the
sums and as candidates. With known assignments, slots are independent of each other, so no program waits for
another.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.learned import Learned, Merging
from ovq.ops.backends.triton import common
from ovq.ops.backends.triton.backward import grad_queries, grad_slots, grad_tokens
from ovq.ops.backends.triton.merging import MergedSlots, PairRecurrence, Steps
from ovq.ops.backends.triton.recurrence import advance
from ovq.ops.backends.triton.rewind import deposit, rewind
from ovq.ops.backends.triton.route import nearest, open_slots
from ovq.ops.backends.triton.weights import Weights
from ovq.ops.backends.triton.work import Work
from ovq.ops.options import LEAST_READ

# Keys of a chunk per program, whatever the head size.
TOKEN_BLOCK = 64
# Bounds on the rounding error of a comparison of two scores, in units of K eps |k| |D|: for a float32
# product, and for three products added up by tensor cores, which round down.
ROUNDING = 2
ROUNDING_SPLIT = 8


class Snapshots(NamedTuple):
    """The means `[chunks, Hkv, M, ...]` and log2 masses that the queries of a segment's chunks read."""

    keys: Tensor
    values: Tensor
    bias: Tensor

    @classmethod
    def empty(cls, num: int, work: Work, k: Tensor, v: Tensor) -> Snapshots:
        """Buffers for `num` chunks, in the dtypes of `k` and `v`."""
        shape = (num, work.num_kv_heads, work.capacity)
        return cls(
            k.new_empty(*shape, k.shape[-1]),
            v.new_empty(*shape, v.shape[-1]),
            torch.empty(shape, dtype=torch.float32, device=k.device),
        )


def snapshot_bytes(k: Tensor, v: Tensor) -> int:
    """Bytes per slot in `Snapshots`."""
    return (k.shape[-1] + v.shape[-1]) * k.element_size() + 4


class Recurrence(Steps):
    """`Steps` for rules that merge keys into slots."""

    def __init__(self, *tensors: Any) -> None:
        super().__init__(*tensors)
        k, v, work = self.k, self.v, self.work
        self._block = common.slot_block(k, v)
        self._num_blocks = max(1, triton.cdiv(work.capacity, self._block))
        self._is_split = k.dtype == torch.bfloat16
        streams = work.num_active[0] * work.num_kv_heads
        found = (streams, self._num_blocks, self._chunk_size)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=k.device)

        # Best and second best scores, best slots, best cosines, and the length of the longest mean.
        best, second, winner = empty(*found), empty(*found), empty(*found, dtype=torch.int32)
        self._found = (best, second, winner, empty(*found), empty(*found[:2]))
        self._novelty = empty(streams, self._chunk_size)
        self._sizes = {"BN": self._block, "BK": common.padded(k.shape[-1]), **self._fused}

    def _advance(
        self, streams: int, tables: tuple[Tensor, ...], entries: tuple[int, ...], flags: dict[str, Any]
    ) -> None:
        """As in `Steps`; scores the keys of the next chunks against each block of slots."""
        work, k, v, kept = self.work, self.k, self.v, self._kept
        kept_slots = (None, None, None) if kept is None else (kept.keys, kept.values, kept.weight)
        advance[(streams, self._num_blocks)](
            k, v, self.slots, *tables, self._tokens, self.into.weight, *kept_slots, *self._found, *entries,
            k.shape[1], self._chunk_size, work.num_kv_heads, k.shape[-1], v.shape[-1],
            work.capacity, self._num_blocks, IS_SPLIT=self._is_split, BT=common.score_block(k),
            BV=common.padded(v.shape[-1]), **flags, **self._sizes, num_warps=8,
        )  # fmt: skip

    def _assign(self, i: int) -> None:
        """As in `Steps`, including the keys that open slots."""
        work, k, into, size = self.work, self.k, self.into, self._chunk_size
        rounding = ROUNDING_SPLIT if self._is_split else ROUNDING
        streams = work.num_complete[i] * work.num_kv_heads
        given = (k, self._tokens, into.key_sum, into.mass, work.table)
        shape = (k.shape[1], size, work.num_kv_heads, k.shape[-1], work.capacity, self._num_blocks)
        nearest[(streams, triton.cdiv(size, TOKEN_BLOCK))](
            *given, *self._found, self.slots, self._novelty, work.first[i], *shape,
            ROUNDING=rounding, BT=TOKEN_BLOCK, **self._sizes,
        )  # fmt: skip
        if work.num_opening[i] > 0:
            open_slots[(streams,)](
                *given, self._found[3], self.slots, self._novelty, work.first[i], *shape,
                ROUNDING=rounding, BC=triton.next_power_of_2(size), **self._sizes,
            )  # fmt: skip


def recurrence_of(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    into: Dictionary,
    work: Work,
    merged: MergedSlots | None,
    weights: Weights | None,
) -> Steps:
    """The `Steps` of a call for its merge rule, with the arguments of `Steps`.

    Args:
        merged: buffers for the slots that all chunks merge into others, if the backward needs them.
    """
    if not work.options.merges_pairs:
        return Recurrence(k, v, slots, into, work, weights)
    room = merged or MergedSlots.empty(work, k, v, is_kept=False, has_weights=weights is not None)
    return PairRecurrence(k, v, slots, into, work, weights, merged=room, is_kept=merged is not None)


def merge(chunks: Merging, work: Work | None = None, merged: MergedSlots | None = None) -> Tensor:
    """Merge complete chunks in place, without computing attention.

    Args:
        work: `Work` of their plan, if already computed.
        merged: receives the slots that chunks merged into others, or None.

    Returns:
        The slot of each token, `[num_chunks, W, Hkv]`.
    """
    k, v, sums, weights = chunks.k.contiguous(), chunks.v.contiguous(), chunks.sums, chunks.token_weights
    work = _work(chunks) if work is None else work
    of_tokens = None if weights is None else Weights(weights.squeeze(-1).contiguous())
    slots = torch.zeros(k.shape[0], k.shape[2], k.shape[1], dtype=torch.int32, device=k.device)
    recurrence = recurrence_of(k, v, slots, sums, work, merged, of_tokens)
    # Triton launches on the current device, even if the tensors are on another.
    with torch.cuda.device_of(k):
        for i in range(work.num_steps + 1):
            recurrence.step(i)
    return slots.transpose(1, 2)


def learn(chunks: Merging) -> Learned:
    """Merge complete chunks without computing attention and return the slots of their tokens."""
    if not chunks.plan.options.merges_pairs:
        return Learned(merge(chunks), None)
    work, has_weights = _work(chunks), chunks.token_weights is not None
    merged = MergedSlots.empty(work, chunks.k, chunks.v, is_kept=True, has_weights=has_weights)
    # Incomplete chunks write nothing.
    merged.slot.fill_(-1)
    slots = merge(chunks, work, merged)
    # From the order of the recurrence to the order of the layout.
    order = work.table[:, 0].argsort()
    return Learned.of_moves(slots, merged.slot[order], merged.into[order], chunks.sums.count.shape[2])


def _work(chunks: Merging) -> Work:
    return Work(chunks.plan, chunks.sums.count.shape[2], chunks.k.device)


@dataclasses.dataclass
class Saved:
    """Tensors saved for the backward: inputs, outputs, and the slots of the tokens.

    For rules that merge pairs also the slots merged into others; with token weights also `Weights`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor
    o: Tensor
    lse: Tensor
    slots: Tensor
    merged: MergedSlots | None = None
    weights: Weights | None = None


class BackwardPass:
    """Runs the backward through the segments, from the last to the first.

    Args:
        saved: contiguous tensors.
        grad_o: `[num_chunks, W, H, V]`.
        final: the final dictionary, rewound in place to the initial one.
        grads: gradient of its sums and weights, float32, likewise (the count is not used).
        work: `Work` of the forward.
    """

    def __init__(
        self,
        saved: Saved,
        grad_o: Tensor,
        final: Dictionary,
        grads: Dictionary,
        work: Work,
    ) -> None:
        self.saved, self.grad_o, self.work = saved, grad_o, work
        self.final, self.grads = final, grads
        self._masses = final.mass, torch.empty_like(final.mass)
        self.grad_q, self.grad_k, self.grad_v = (torch.empty_like(x) for x in (saved.q, saved.k, saved.v))
        self._tokens = None if saved.weights is None else saved.weights.tokens
        self.grad_weights = None if self._tokens is None else torch.empty_like(self._tokens)
        self._own_bias = None if saved.weights is None else saved.weights.own_bias
        # What slot means are like: with weights, whose gradients are small differences, they are not rounded.
        self._means = (saved.k, saved.v) if self._tokens is None else (final.key_sum, final.value_sum)
        self._delta = torch.empty_like(saved.lse)
        num_chunks, width, num_heads, dim = saved.q.shape
        value_dim = saved.v.shape[-1]
        # W, H, G, K, V, and block sizes of the three kernels of the read's backward.
        self._sizes = (width, num_heads, num_heads // work.num_kv_heads, dim, value_dim)
        self._blocks = common.grad_blocks(saved.q, saved.v) | common.FUSED
        self._blocks |= {"BK": common.padded(dim), "BV": common.padded(value_dim)}
        self._query_blocks = triton.cdiv(width, self._blocks["BM"])
        # One per chunk and block of queries. Zeros, because blocks without queries write nothing.
        shape = (num_chunks, self._query_blocks, num_heads)
        self.grad_scale = torch.zeros(shape, dtype=torch.float32, device=grad_o.device)

        # Gradients passed from slots to the slots merged into them, of even and odd steps.
        merged = saved.merged
        streams, size = work.num_active[0] * work.num_kv_heads, work.options.chunk_size
        # Dimensions of keys and values, and 1 for weights.
        self._dims = [dim, value_dim, *([] if self._tokens is None else [1])]
        self._passed = [
            saved.lse.new_empty(2, streams, 0 if merged is None else size, dim) for dim in self._dims
        ]

    def run(self) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v, the scale, and token weights `[num_chunks, W, Hkv, 1]` (None without)."""
        k, v = self.saved.k, self.saved.v
        with torch.cuda.device_of(k):
            for segment in reversed(
                self.work.segments(snapshot_bytes(*self._means) + 4 * (k.shape[-1] + v.shape[-1]))
            ):
                self._back(segment)
            if self.saved.merged is not None and self.work.capacity:
                # One more launch gives the slots that the first chunk merged into others their gradient.
                self._deposit_steps(range(0, 0), range(0, 0), self._passed, self._passed)
        of_weights = None if self.grad_weights is None else self.grad_weights[..., None]
        return self.grad_q, self.grad_k, self.grad_v, self.grad_scale.sum((0, 1)), of_weights

    def _back(self, segment: range) -> None:
        """Compute all gradients of a segment."""
        work = self.work
        num = work.entries(segment)
        snapshots = Snapshots.empty(num, work, *self._means)
        slots = (num, work.num_kv_heads, work.capacity)
        tokens = (num, work.num_kv_heads, self._sizes[0])
        from_slots = [self.saved.lse.new_empty(*slots, dim) for dim in self._dims]
        deposits = [self.saved.lse.new_empty(*tokens, dim) for dim in self._dims]
        if work.capacity:
            self._rewind(segment, snapshots)
        self._grad_queries(segment, snapshots)
        if work.capacity:
            self._grad_slots(segment, snapshots, from_slots)
            self._deposit(segment, from_slots, deposits)
        self._grad_tokens(segment, deposits)

    def _by_slots(self, segment: range) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int]]:
        """Grid, arguments and block sizes of the kernels that process a segment by blocks of slots."""
        work, block = self.work, common.slot_block(self.saved.k, self.saved.v)
        grid = (work.num_active[0] * work.num_kv_heads, triton.cdiv(work.capacity, block))
        ends = (segment.start, segment.stop, work.first[segment.start])
        sizes = (self.saved.k.shape[1], work.options.chunk_size, work.num_kv_heads)
        return grid, (*ends, *sizes), {"BN": block, "TB": TOKEN_BLOCK, "num_warps": 8, **common.FUSED}

    def _rewind(self, segment: range, snapshots: Snapshots) -> None:
        work, final = self.work, self.final
        grid, arguments, blocks = self._by_slots(segment)
        after, before = self._masses
        parts = (
            (self.saved.k, final.key_sum, snapshots.keys),
            (self.saved.v, final.value_sum, snapshots.values),
        )
        for i, (x, sums, means) in enumerate(parts):
            rewind[grid](
                x, self.saved.slots, sums, after, before, work.table, work.first_of_step, work.rows_of_step,
                means, snapshots.bias, *self._merged(i), *self._kept(i), *arguments, x.shape[-1],
                work.capacity, HAS_BIAS=i == 0, HAS_MERGED=self.saved.merged is not None,
                BD=common.padded(x.shape[-1]), **blocks,
            )  # fmt: skip
        self._masses = before, after

    def _merged(self, i: int) -> tuple[Tensor, ...]:
        """Arguments of `rewind` about slots merged into others, for keys (0) or values (1)."""
        slots, merged = self.saved.slots, self.saved.merged
        if merged is None:
            return slots, slots, slots, slots
        mass = merged.num if merged.weight is None else merged.weight
        return merged.slot, merged.into, mass, (merged.keys, merged.values)[i]

    def _kept(self, i: int) -> tuple[Tensor | None, ...]:
        """Arguments of `rewind` about copies of changed slots, likewise."""
        if self.saved.weights is None:
            return None, None, None
        kept = self.saved.weights.kept
        assert kept is not None
        return kept.slot, kept.weight, (kept.keys, kept.values)[i]

    def _deposit(self, segment: range, from_slots: list[Tensor], deposits: list[Tensor]) -> None:
        if self.saved.merged is None:
            self._deposit_steps(segment, segment, from_slots, deposits)
        else:
            for i in reversed(segment):
                self._deposit_steps(segment, range(i, i + 1), from_slots, deposits)

    def _deposit_steps(
        self, segment: range, steps: range, from_slots: list[Tensor], deposits: list[Tensor]
    ) -> None:
        """Accumulate the gradients of the sums through some steps of a segment."""
        work = self.work
        grid, arguments, blocks = self._by_slots(segment)
        arguments = (steps.start, steps.stop, *arguments[2:])
        totals = [self.grads.key_sum, self.grads.value_sum]
        if self.grads.weight is not None:
            totals.append(self.grads.weight[..., None])
        for total, added, given, passed in zip(totals, from_slots, deposits, self._passed, strict=True):
            deposit[grid](
                self.saved.slots, total, work.table, work.first_of_step, work.rows_of_step, added, given,
                *self._merged(0)[:2], passed, *arguments, total.shape[-1], work.capacity,
                HAS_MERGED=self.saved.merged is not None, BD=common.padded(total.shape[-1]), **blocks,
            )  # fmt: skip

    def _grad_queries(self, segment: range, snapshots: Snapshots) -> None:
        saved, work = self.saved, self.work
        grad_queries[(work.entries(segment) * self._query_blocks, self._sizes[1])](
            saved.q, saved.k, saved.v, saved.scale, work.table, *snapshots, self._own_bias,
            saved.o, self.grad_o, saved.lse, self._delta, self.grad_q, self.grad_scale,
            work.first[segment.start], *self._sizes, work.capacity, self._query_blocks, **self._blocks,
        )  # fmt: skip

    def _grad_slots(self, segment: range, snapshots: Snapshots, from_slots: list[Tensor]) -> None:
        saved, work = self.saved, self.work
        num_blocks = triton.cdiv(work.capacity, self._blocks["BN"])
        grad_slots[(work.entries(segment) * num_blocks, work.num_kv_heads)](
            saved.q, saved.scale, work.table, *snapshots, self.grad_o, saved.lse,
            self._delta, *_with_none(from_slots), work.first[segment.start], *self._sizes, work.capacity,
            num_blocks, **self._blocks,
        )  # fmt: skip

    def _grad_tokens(self, segment: range, deposits: list[Tensor]) -> None:
        saved, work = self.saved, self.work
        num_blocks = triton.cdiv(self._sizes[0], self._blocks["BN"])
        grad_tokens[(work.entries(segment) * num_blocks, work.num_kv_heads)](
            saved.q, saved.k, saved.v, saved.scale, work.table, self.grad_o, saved.lse, self._delta,
            *deposits[:2], self.grad_k, self.grad_v, self._tokens, self._own_bias, _with_none(deposits)[2],
            self.grad_weights, work.first[segment.start], *self._sizes, num_blocks,
            LEAST=LEAST_READ, **self._blocks,
        )  # fmt: skip


def _with_none(parts: list[Tensor]) -> list[Tensor | None]:
    """The tensors of keys, values and weights, with None for missing weights."""
    return [*parts, *[None] * (3 - len(parts))]
