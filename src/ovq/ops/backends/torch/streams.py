"""Division of a call in the `torch` backend: groups of streams, and steps (chunks) of a group.

A *stream* is one key/value head of one row. Streams are independent. They are processed in groups, small
enough for their scores to fit in the cache and large enough to keep every core busy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan

# Maximum number of score elements of a group. CPU: 16 MiB of float32, a compromise between one head at a time
# (call overhead) and all at once (out of the cache). GPU: 4 GiB, as larger products are faster.
CPU_ELEMENTS = 1 << 22
GPU_ELEMENTS = 1 << 30
# Queries per block. A block attends to no token after it; with two blocks per chunk this saves nearly half of
# the products within the chunk. Smaller blocks cost more in calls than they save.
READ_BLOCK = 128


def block_size(plan: Plan) -> int:
    """Number of queries per block."""
    return min(plan.aligned.width, READ_BLOCK)


def groups_of(plan: Plan, device: torch.device) -> Iterator[Group]:
    """Groups of all streams of a call."""
    elements = plan.group_size * block_size(plan) * (plan.aligned.width + plan.capacity)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        streams = max(threads, CPU_ELEMENTS // elements // threads * threads)
    else:
        streams = max(1, GPU_ELEMENTS // elements)
    # Whole rows if they fit, else a block of heads of one row at a time.
    num_rows = max(1, streams // plan.num_kv_heads)
    num_heads = min(streams, plan.num_kv_heads)
    for row in range(0, len(plan.slots), num_rows):
        rows = range(row, min(row + num_rows, len(plan.slots)))
        for head in range(0, plan.num_kv_heads, num_heads):
            yield Group(plan, rows, range(head, min(head + num_heads, plan.num_kv_heads)))


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of streams: a range of sorted rows times a range of key/value heads, numbered row by row."""

    plan: Plan
    rows: range
    heads: range

    @property
    def num_streams(self) -> int:
        """Number of streams."""
        return len(self.rows) * len(self.heads)

    def dictionary(self, of: Dictionary) -> Dictionary:
        """The group's part of a dictionary, as views."""
        return of.map(self.streams)

    def streams(self, x: Tensor) -> Tensor:
        """The group's part `[S, ...]` of a tensor `[R, Hkv, ...]` in sorted row order, as a view."""
        part = x[self.rows.start : self.rows.stop, self.heads.start : self.heads.stop]
        # A group has all heads or a single row, so its streams are adjacent and `view` works.
        return part.view(self.num_streams, *x.shape[2:])

    def steps(self) -> list[Step]:
        """The chunks of the group, in order."""
        return [Step(self, i) for i in range(self.plan.aligned.chunks_of(self.rows.start))]


class Step:
    """The i-th chunk of a group's rows.

    Attributes:
        num_tokens: number of positions of the chunk in use, w.
        num_streams: number of streams with an i-th chunk, a prefix of the group's streams.
        num_complete: number of streams whose i-th chunk is complete, a prefix of those.
        before: number of slots of each of the `num_streams` streams before the chunk.
        after: number of slots of each of the `num_complete` streams after the chunk.
        num_slots: maximum of `before`, n.
        query_heads: the query heads of the group.
        heads: key/value head of each of the `num_complete` streams.
        num_seen: tokens seen at the end of the chunk by the row of each of the `num_complete` streams.
        tokens: the positions of the chunk in use.
        blocks: the same positions in blocks of queries.
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

        A writable view, unless the chunks of the rows are unevenly spaced.
        """
        heads, per_head = self.group.heads, x.shape[2] // self.group.plan.num_kv_heads
        part = x[self._chunks, tokens, heads.start * per_head : heads.stop * per_head]
        return part.transpose(1, 2)

    def take(self, x: Tensor) -> Tensor:
        """The step's tokens of `x` `[num_chunks, W, Hkv * p, D]` as `[S, p * w, D]`, p heads per stream."""
        part = self.part(x, self.tokens)
        return part.reshape(self.num_streams, -1, x.shape[-1])

    def scales(self, scale: Tensor) -> Tensor:
        """Scales `[S, G]` of each stream from `scale` `[H]`."""
        own = scale[self.query_heads].view(len(self.group.heads), -1)
        return own.repeat(self.num_streams // len(own), 1)

    def complete_chunk(self, k: Tensor, v: Tensor, w: Tensor | None, wide: torch.dtype) -> CompleteChunk:
        """The complete chunks of the step, from all keys, values and weights; `wide` is the dtype of sums."""
        keys, values = (self.take(x)[: self.num_complete].to(wide) for x in (k, v))
        weights = None if w is None else self.take(w)[: self.num_complete, :, 0]
        return CompleteChunk(self, keys, values, weights)

    def put(self, out: Tensor, x: Tensor, tokens: slice) -> None:
        """Write `x` `[S, p * w, D]` to `tokens` of the step in `out` `[num_chunks, W, Hkv * p, D]`."""
        heads, per_head = self.group.heads, out.shape[2] // self.group.plan.num_kv_heads
        x = x.view(-1, len(heads) * per_head, tokens.stop - tokens.start, out.shape[-1])
        out[self._chunks, tokens, heads.start * per_head : heads.stop * per_head] = x.transpose(1, 2).to(
            out.dtype
        )

    def put_complete(self, out: Tensor, x: Tensor) -> None:
        """Write `x` `[num_complete, w, D]` of the complete chunks; zeros for the other streams."""
        missing = self.num_streams - self.num_complete
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        self.put(out, x, self.tokens)


@dataclasses.dataclass(frozen=True)
class CompleteChunk:
    """The complete chunks of S streams of a step.

    Attributes:
        step: the step, whose first S streams these are.
        keys: `[S, C, K]` in the dtype of the sums. values: `[S, C, V]`.
        weights: `[S, C]`; None without token weights.
    """

    step: Step
    keys: Tensor
    values: Tensor
    weights: Tensor | None = None

    @property
    def before(self) -> list[int]:
        """Number of slots in use in each stream."""
        return self.step.before[: self.step.num_complete]


def _progression(chunks: list[int]) -> slice | list[int]:
    """Indices as a slice if evenly spaced, as in a dense batch: a slice makes views, a list copies."""
    stride = chunks[1] - chunks[0] if len(chunks) > 1 else 1
    is_even = stride > 0 and chunks == list(range(chunks[0], chunks[-1] + 1, stride))
    return slice(chunks[0], chunks[-1] + 1, stride) if is_even else chunks
