"""`Work`: the table of chunks that kernels look up, and the division of a call into segments."""

from __future__ import annotations

import torch

from ovq.ops.backends.plan import Plan

# Maximum bytes for the dictionaries of a segment, one for each chunk.
SEGMENT_BYTES = 256 << 20


class Work:
    """The chunks of a call in the order of the recurrence: the first chunks of all rows, then the second, ...

    Rows are sorted by length, longest first, so the rows with an i-th chunk come first, and likewise the rows
    whose i-th chunk is complete: chunk i of row r is entry `first[i] + r`.

    Attributes:
        table: `[num_chunks, 5]` int32: index of the chunk in the aligned layout, slots in use before and
            after it, its number of tokens, whether it is complete.
        first: for each step i, the entry of the first row's i-th chunk, then the number of entries.
            `first_of_step` is the same on the device.
        num_active: for each step i, the number of rows with an i-th chunk; `rows_of_step` is the same on the
            device.
        num_complete: for each step i, the number of rows whose i-th chunk is complete.
        before: for each step i, the slots in use before it in each of these complete rows.
        due: for each step i, the number of merges in each of these rows by rules that merge pairs. `num_due`
            is the maximum over the rows.
        num_opening: for each step i, the maximum number of slots that a row opens, not counting slot 0.
        options: the layer's settings.
        capacity: number of slots allocated for the sums.
        num_kv_heads: Hkv.
    """

    def __init__(self, plan: Plan, capacity: int, device: torch.device) -> None:
        aligned = plan.aligned
        num_steps = aligned.chunks_of(0)
        self.num_active = [aligned.num_active(i) for i in range(num_steps)]
        self.num_complete = [aligned.num_complete(i) for i in range(num_steps)]
        self.before: list[list[int]] = []
        self.due: list[list[int]] = []
        self.num_opening: list[int] = []
        self.first = [0]
        entries: list[list[int]] = []
        for i, active in enumerate(self.num_active):
            opening = 0
            for r in range(active):
                sizes, is_complete = plan.slots[r], r < self.num_complete[i]
                after = sizes[i + 1] if is_complete else sizes[i]
                opening = max(opening, after - max(1, sizes[i]))
                tokens = min(aligned.width, aligned.lengths[r] - i * aligned.width)
                entries.append([aligned.first_chunk[r] + i, sizes[i], after, tokens, int(is_complete)])
            complete = plan.slots[: self.num_complete[i]]
            self.before.append([sizes[i] for sizes in complete])
            self.due.append([sizes[i] + aligned.width - sizes[i + 1] for sizes in complete])
            self.num_opening.append(opening)
            self.first.append(len(entries))
        self.num_due = [max(of_rows, default=0) for of_rows in self.due]
        self._num_merged = plan.num_merged
        self.table = torch.tensor(entries, dtype=torch.int32).to(device)
        steps = torch.tensor([self.first, [*self.num_active, 0]], dtype=torch.int32).to(device)
        self.first_of_step, self.rows_of_step = steps.unbind()
        self.options = plan.options
        self.capacity = capacity
        self.num_kv_heads = plan.num_kv_heads
        self.num_steps = num_steps

    def merged_before(self, i: int) -> list[int]:
        """Number of tokens merged before step i in each row whose i-th chunk is complete."""
        size = self.options.chunk_size
        return [num + i * size for num in self._num_merged[: self.num_complete[i]]]

    def segments(self, bytes_a_slot: int) -> list[range]:
        """Segments: runs of at least one step whose dictionaries together fit in `SEGMENT_BYTES`.

        Args:
            bytes_a_slot: bytes per slot of each chunk and key/value head.
        """
        most = max(1, SEGMENT_BYTES // max(1, bytes_a_slot * self.num_kv_heads * self.capacity))
        found: list[range] = []
        start = 0
        for i in range(self.num_steps):
            if self.first[i + 1] - self.first[start] > most and i > start:
                found.append(range(start, i))
                start = i
        return [*found, range(start, self.num_steps)]

    def entries(self, steps: range) -> int:
        """Number of chunks of a segment."""
        return self.first[steps.stop] - self.first[steps.start]
