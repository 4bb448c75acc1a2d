"""`Plan`: the work of a call (layout, slots per chunk), computed before any arithmetic."""

from __future__ import annotations

import dataclasses

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.call import Rows
from ovq.ops.options import Options
from ovq.ops.schedule import slots_by_chunk


@dataclasses.dataclass(frozen=True)
class Plan:
    """The work of a call, computed before any arithmetic.

    Attributes:
        aligned: the chunk-aligned layout of the rows.
        slots: for each sorted row, the number of slots before each complete chunk and after the last one.
        num_merged: number of tokens merged into each sorted row's dictionary before the call.
        num_kv_heads: Hkv.
        group_size: query heads per key/value head, G.
        options: the layer's settings.
    """

    aligned: AlignedRows
    slots: list[list[int]]
    num_merged: list[int]
    num_kv_heads: int
    group_size: int
    options: Options

    @classmethod
    def make(
        cls,
        aligned: AlignedRows,
        *,
        opened: list[int],
        num_merged: list[int],
        num_kv_heads: int,
        group_size: int,
        options: Options,
    ) -> Plan:
        """The plan for sorted rows whose dictionaries start with `opened` slots and `num_merged` tokens."""
        slots = [
            slots_by_chunk(n, merged, length // options.chunk_size, **options.schedule)
            for n, merged, length in zip(opened, num_merged, aligned.lengths, strict=True)
        ]
        return cls(aligned, slots, num_merged, num_kv_heads, group_size, options)

    @classmethod
    def of_chunks(
        cls,
        *,
        opened: list[int],
        num_merged: list[int],
        num_kv_heads: int,
        options: Options,
    ) -> Plan:
        """The plan for merging one complete chunk per row without computing attention; see `make`."""
        size, num = options.chunk_size, len(opened)
        rows = Rows(tuple(range(0, num * size, size)), (size,) * num)
        aligned = AlignedRows(rows, pending=[0] * num, chunk_size=size, num_tokens=num * size)
        return cls.make(
            aligned,
            opened=opened,
            num_merged=num_merged,
            num_kv_heads=num_kv_heads,
            group_size=1,
            options=options,
        )

    @property
    def capacity(self) -> int:
        """Maximum number of slots of a row at the end."""
        return max((sizes[-1] for sizes in self.slots), default=0)
