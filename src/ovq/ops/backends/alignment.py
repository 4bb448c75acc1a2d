"""The chunk-aligned layout that the fast backends share.

The rows of a call may be padded left or right, packed into a batch of 1, or continue a state with pending
tokens. All are brought into one layout: every row starts at a chunk boundary with its pending tokens, and is
padded to whole chunks. Rows are sorted by length, longest first, so that the rows with an i-th chunk, and the
rows whose i-th chunk is complete, are each a prefix of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovq.ops.call import Rows


class AlignedRows:
    """The chunk-aligned layout of `rows`, sorted by length.

    Attributes:
        order: index in the call of each sorted row.
        is_sorted: whether the rows of the call are already sorted.
        lengths: number of tokens of each sorted row, including pending ones.
        pending: number of pending tokens of each sorted row at the start.
        width: positions per chunk: the chunk size, or fewer if every row fits in one incomplete chunk.
        first_chunk: index of each sorted row's first chunk; its i-th chunk is `first_chunk[r] + i`.
        num_chunks: number of chunks of all rows.

    Example:
        >>> aligned = AlignedRows(Rows((0, 10), (10, 3)), pending=[0, 2], chunk_size=4, num_tokens=20)
        >>> aligned.order, aligned.lengths, aligned.first_chunk, aligned.num_chunks
        ([0, 1], [10, 5], [0, 3], 5)
        >>> AlignedRows(Rows((0, 1, 3), (1, 2, 3)), pending=[0] * 3, chunk_size=4, num_tokens=6).inverse()
        [2, 1, 0]
        >>> aligned.num_active(1), aligned.num_complete(1)
        (2, 1)
    """

    def __init__(self, rows: Rows, *, pending: Sequence[int], chunk_size: int, num_tokens: int) -> None:
        totals = [p + n for p, n in zip(pending, rows.lengths, strict=True)]
        self.order = sorted(range(len(rows)), key=lambda r: -totals[r])
        self.is_sorted = self.order == list(range(len(rows)))
        self.lengths = [totals[r] for r in self.order]
        self.pending = [pending[r] for r in self.order]
        self.starts = [rows.starts[r] for r in self.order]
        self.chunk_size = chunk_size
        # The longest row's.
        self._length = length = max(totals, default=0)
        self.width = max(1, min(chunk_size, length))
        self.first_chunk: list[int] = []
        self.num_chunks = 0
        for n in self.lengths:
            self.first_chunk.append(self.num_chunks)
            self.num_chunks += -(-n // self.width)
        self.num_tokens = num_tokens
        self._new = [n - p for n, p in zip(self.lengths, self.pending, strict=True)]
        # If rows fill the input exactly, the layout is a view or needs one padding. Pending tokens exclude
        # this, as they are not in the input: the same number of padding columns would be taken for them.
        self.is_dense = (
            not any(self.pending)
            and all(n == length for n in self.lengths)
            and self.starts == [r * length for r in range(len(self.lengths))]
            and len(self.lengths) * length == num_tokens
        )

    def inverse(self) -> list[int]:
        """Sorted position of each row of the call."""
        return sorted(range(len(self.order)), key=self.order.__getitem__)

    def num_active(self, i: int) -> int:
        """Number of rows that have an i-th chunk, complete or not."""
        return sum(n > i * self.width for n in self.lengths)

    def num_complete(self, i: int) -> int:
        """Number of rows whose i-th chunk is complete."""
        return sum(n >= (i + 1) * self.chunk_size for n in self.lengths)

    def chunks_of(self, r: int) -> int:
        """Number of chunks of the sorted row `r`."""
        return -(-self.lengths[r] // self.width)

    def _spread(self, first: Sequence[int], num: Sequence[int], device: torch.device) -> Tensor:
        """Indices first[r], ..., first[r] + num[r] - 1 of all rows, concatenated."""
        counts = torch.tensor(num, dtype=torch.int64, device="cpu")
        ends = counts.cumsum(0)
        offsets = torch.tensor(first, dtype=torch.int64, device="cpu") - (ends - counts)
        total = int(ends[-1]) if len(num) else 0
        return (torch.arange(total, device="cpu") + offsets.repeat_interleave(counts)).to(device)

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of each new token in the flattened input and in the aligned layout."""
        source = self._spread(self.starts, self._new, device)
        first = [c * self.width + p for c, p in zip(self.first_chunk, self.pending, strict=True)]
        return source, self._spread(first, self._new, device)

    def align(self, x: Tensor, pending: Tensor | None) -> Tensor:
        """`x` `[B, T, H, D]` as chunks `[num_chunks, width, H, D]`.

        Args:
            x: queries, keys or values.
            pending: `[R, H, C, D]` pending keys or values of the rows in sorted order; None for queries,
                whose pending positions are never used.
        """
        if self.is_dense:
            x = x.reshape(len(self.lengths), self._length, *x.shape[2:])
            missing = -self._length % self.width
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
            return x.reshape(self.num_chunks, self.width, *x.shape[2:])
        source, place = self._places(x.device)
        flat = x.reshape(-1, *x.shape[2:])
        out = flat.new_zeros(self.num_chunks * self.width, *flat.shape[1:])
        out = out.index_copy(0, place, flat.index_select(0, source))
        if pending is not None and any(self.pending):
            first = [c * self.width for c in self.first_chunk]
            place = self._spread(first, self.pending, x.device)
            slots = [r * self.chunk_size for r in range(len(self.lengths))]
            source = self._spread(slots, self.pending, x.device)
            flat_pending = pending.transpose(1, 2).reshape(-1, *flat.shape[1:])
            out = out.index_copy(0, place, flat_pending.index_select(0, source))
        return out.reshape(self.num_chunks, self.width, *flat.shape[1:])

    def unalign(self, chunks: Tensor, batch: int, length: int) -> Tensor:
        """Chunks `[num_chunks, width, H, D]` of outputs as `[batch, length, H, D]`, zero at padding."""
        if self.is_dense:
            columns = -(-self._length // self.width) * self.width
            x = chunks.reshape(len(self.lengths), columns, *chunks.shape[2:])[:, : self._length]
            return x.reshape(batch, length, *chunks.shape[2:])
        source, place = self._places(chunks.device)
        flat = chunks.reshape(-1, *chunks.shape[2:])
        out = flat.new_zeros(self.num_tokens, *flat.shape[1:])
        out = out.index_copy(0, source, flat.index_select(0, place))
        return out.reshape(batch, length, *flat.shape[1:])

    def tail(self, chunks: Tensor) -> Tensor:
        """The tokens after each sorted row's last complete chunk, as pending buffers `[R, H, C, D]`."""
        flat = chunks.reshape(-1, *chunks.shape[2:])
        num = [n % self.chunk_size for n in self.lengths]
        first = [c * self.width + n - m for c, n, m in zip(self.first_chunk, self.lengths, num, strict=True)]
        source = self._spread(first, num, flat.device)
        place = self._spread([r * self.chunk_size for r in range(len(num))], num, flat.device)
        out = flat.new_zeros(len(num) * self.chunk_size, *flat.shape[1:])
        out = out.index_copy(0, place, flat.index_select(0, source))
        return out.reshape(len(num), self.chunk_size, *flat.shape[1:]).transpose(1, 2).contiguous()
