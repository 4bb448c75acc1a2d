"""How the `torch` backend divides a call into work: groups of streams, and their steps.

A *stream* is one key/value head of one row. Streams are independent. They are processed in groups that are
small enough for their scores to stay in the cache, and large enough to keep every core busy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan

# Elements of score scratch that a group may use. On a CPU 16 MiB of float32, a compromise between one head at
# a time (overhead of calls) and all at once (out of the cache); on a GPU, where the largest products are
# best, 4 GiB.
CPU_ELEMENTS = 1 << 22
GPU_ELEMENTS = 1 << 30
# Queries read together. They attend to no token after their own block; with two blocks in a chunk this saves
# nearly half the products within the chunk. Smaller blocks cost more in calls than they save.
READ_BLOCK = 128


def block_size(plan: Plan) -> int:
    """Queries of a chunk that are read together."""
    return min(plan.aligned.width, READ_BLOCK)


def groups_of(plan: Plan, device: torch.device) -> Iterator[Group]:
    """The streams of a call in groups."""
    elements = plan.group_size * block_size(plan) * (plan.aligned.width + plan.capacity)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        streams = max(threads, CPU_ELEMENTS // elements // threads * threads)
    else:
        streams = max(1, GPU_ELEMENTS // elements)
    # Whole rows where they fit; otherwise one row at a time, and a block of its heads at a time.
    num_rows = max(1, streams // plan.num_kv_heads)
    num_heads = min(streams, plan.num_kv_heads)
    for row in range(0, len(plan.slots), num_rows):
        rows = range(row, min(row + num_rows, len(plan.slots)))
        for head in range(0, plan.num_kv_heads, num_heads):
            yield Group(plan, rows, range(head, min(head + num_heads, plan.num_kv_heads)))


@dataclasses.dataclass(frozen=True)
class Group:
    """A block of streams: some sorted rows, and some key/value heads of them, numbered row by row."""

    plan: Plan
    rows: range
    heads: range

    @property
    def num_streams(self) -> int:
        """Streams of the group."""
        return len(self.rows) * len(self.heads)

    def dictionary(self, of: Dictionary) -> Dictionary:
        """The group's streams of a dictionary, as views."""
        return of.map(self.streams)

    def streams(self, x: Tensor) -> Tensor:
        """The group's streams `[S, ...]` of a tensor `[R, Hkv, ...]` in sorted row order: a view."""
        part = x[self.rows.start : self.rows.stop, self.heads.start : self.heads.stop]
        # A group has all heads or only one row, so its streams are adjacent and this never copies.
        return part.view(self.num_streams, *x.shape[2:])

    def steps(self) -> list[Step]:
        """The chunks of the group, in order."""
        return [Step(self, i) for i in range(self.plan.aligned.chunks_of(self.rows.start))]


class Step:
    """The i-th chunk of a group's rows.

    Attributes:
        num_tokens: places of the chunk in use, w.
        num_streams: streams that have an i-th chunk: a prefix of the group's.
        num_complete: streams whose i-th chunk is complete: a prefix of those.
        before: slots of each of the `num_streams` streams before the chunk.
        after: slots of each of the `num_complete` streams after it.
        num_slots: the largest of `before`, n.
        query_heads: the query heads of the group.
        heads: key/value head of each of the `num_complete` streams.
        num_seen: tokens that the row of each of those has seen at the end of the chunk.
        tokens: the places of the chunk in use.
        blocks: the same places, in blocks of queries that are read together.
    """

    def __init__(self, group: Group, i: int) -> None:
        plan, aligned = group.plan, group.plan.aligned
        first, num_heads = group.rows.start, len(group.heads)
        rows = group.rows[: max(0, aligned.num_active(i) - first)]
        complete = group.rows[: max(0, aligned.num_complete(i) - first)]
        self.group = group
        self.num_tokens = min(aligned.width, aligned.lengths[first] - i * aligned.width)
        self.num_streams = len(rows) * num_heads
        self.num_complete = len(complete) * num_heads
        self.before = [plan.slots[r][i] for r in rows for _ in group.heads]
        self.after = [plan.slots[r][i + 1] for r in complete for _ in group.heads]
        self.num_slots = max(self.before)
        per_head = plan.group_size
        self.query_heads = slice(group.heads.start * per_head, group.heads.stop * per_head)
        self.heads = [h for _ in complete for h in group.heads]
        self.num_seen = [
            plan.num_merged[r] + (i + 1) * plan.options.chunk_size for r in complete for _ in group.heads
        ]
        self.tokens = slice(0, self.num_tokens)
        self._chunks = _progression([aligned.first_chunk[r] + i for r in rows])
        size = block_size(plan)
        self.blocks = [slice(t, min(t + size, self.num_tokens)) for t in range(0, self.num_tokens, size)]

    def part(self, x: Tensor, tokens: slice) -> Tensor:
        """Tokens of the step in `x` `[num_chunks, W, Hkv * p, D]`, as `[R, p * heads, w, D]`, R rows.

        A view that can be written to, unless the rows are spaced irregularly.
        """
        heads, per_head = self.group.heads, x.shape[2] // self.group.plan.num_kv_heads
        part = x[self._chunks, tokens, heads.start * per_head : heads.stop * per_head]
        return part.transpose(1, 2)

    def take(self, x: Tensor) -> Tensor:
        """The step's tokens of `x` `[num_chunks, W, Hkv * p, D]` as `[S, p * w, D]`, p heads per stream."""
        part = self.part(x, self.tokens)
        return part.reshape(self.num_streams, -1, x.shape[-1])

    def scales(self, scale: Tensor) -> Tensor:
        """`scale` `[H]` by stream, as `[S, G]`."""
        own = scale[self.query_heads].view(len(self.group.heads), -1)
        return own.repeat(self.num_streams // len(own), 1)

    def complete_chunk(self, k: Tensor, v: Tensor, w: Tensor | None, wide: torch.dtype) -> CompleteChunk:
        """The part of all keys, values and weights that is of complete chunks; sums are in `wide`."""
        keys, values = (self.take(x)[: self.num_complete].to(wide) for x in (k, v))
        weights = None if w is None else self.take(w)[: self.num_complete, :, 0]
        return CompleteChunk(self, keys, values, weights)

    def put(self, out: Tensor, x: Tensor, tokens: slice) -> None:
        """Write `x` `[S, p * w, D]` to tokens of the step in `out` `[num_chunks, W, Hkv * p, D]`."""
        heads, per_head = self.group.heads, out.shape[2] // self.group.plan.num_kv_heads
        x = x.view(-1, len(heads) * per_head, tokens.stop - tokens.start, out.shape[-1])
        out[self._chunks, tokens, heads.start * per_head : heads.stop * per_head] = x.transpose(1, 2).to(
            out.dtype
        )

    def put_complete(self, out: Tensor, x: Tensor) -> None:
        """Write `x` `[num_complete, w, D]`, only for the streams whose chunk is complete."""
        missing = self.num_streams - self.num_complete
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        self.put(out, x, self.tokens)


@dataclasses.dataclass(frozen=True)
class CompleteChunk:
    """The complete chunk of S streams of a step.

    Attributes:
        step: the step; the streams are its first ones.
        keys: `[S, C, K]` in the dtype of the sums. values: `[S, C, V]`.
        weights: `[S, C]` where tokens have weights, else None.
    """

    step: Step
    keys: Tensor
    values: Tensor
    weights: Tensor | None = None

    @property
    def before(self) -> list[int]:
        """Slots in use in each stream."""
        return self.step.before[: self.step.num_complete]


def _progression(chunks: list[int]) -> slice | list[int]:
    """Indices as a slice if they are evenly spaced, as in a dense batch: a slice makes views, a list
    copies."""
    stride = chunks[1] - chunks[0] if len(chunks) > 1 else 1
    is_even = stride > 0 and chunks == list(range(chunks[0], chunks[-1] + 1, stride))
    return slice(chunks[0], chunks[-1] + 1, stride) if is_even else chunks
