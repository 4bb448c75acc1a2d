"""`merge="nearest"` in Triton: the order of the kernels that merge the chunks of a call.

For each step i: `advance_items` merges chunk i - 1 into the slots, writes the dictionary that chunk i reads
and the slot means as items; `prepare` adds the tokens as items. PyTorch then selects the items to merge by
matrix products and selections (`ovq.ops.nearest`), some of which the host waits for. `settle` computes the
slots of the tokens and lists the slots merged into others; `keep` copies their sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.triton import common
from ovq.ops.backends.triton.items import INT_FIELDS, INTO, advance_items, keep, prepare, settle
from ovq.ops.backends.triton.weights import Weights
from ovq.ops.backends.triton.work import Work
from ovq.ops.narrow import STATE_DTYPES
from ovq.ops.nearest import Items, movers, nearest_roots
from ovq.ops.precision import full_precision

# Maximum bytes of item products held at once (at least one stream is processed at a time).
PRODUCT_BYTES = 1 << 30
# Columns are allocated in multiples of this, which keeps the fields of the table aligned.
_ALIGNED = 16
# Slots copied per program of `keep`.
_KEPT = 16


class MergedSlots(NamedTuple):
    """Slots that chunks merged into others, saved so that the backward can undo the merges.

    Attributes:
        slot: `[entries, Hkv, C]` int32 merged slots, -1 after the last; a chunk makes at most C merges.
        into: `[entries, Hkv, C]` int32 slots that they were merged into.
        num: `[entries, Hkv, C]` int64 counts of the merged slots.
        keys: `[entries, Hkv, C, K]` float32 sums of the merged slots. values: `[entries, Hkv, C, V]`.
        weight: `[entries, Hkv, C]` float32 weights of the merged slots; None without token weights.
    """

    slot: Tensor
    into: Tensor
    num: Tensor
    keys: Tensor
    values: Tensor
    weight: Tensor | None = None

    @classmethod
    def empty(
        cls, work: Work, k: Tensor, v: Tensor, *, is_kept: bool, has_weights: bool = False
    ) -> MergedSlots:
        """Buffers for all chunks of a call if `is_kept`, else for one step."""
        num = work.first[-1] if is_kept else work.num_active[0]
        shape = (num, work.num_kv_heads, work.options.chunk_size)
        slot, into = (k.new_empty(shape, dtype=torch.int32) for _ in range(2))
        keys, values = (x.new_empty(*shape, x.shape[-1], dtype=torch.float32) for x in (k, v))
        weight = k.new_empty(shape, dtype=torch.float32) if has_weights else None
        return cls(slot, into, k.new_empty(shape, dtype=torch.int64), keys, values, weight)


class Steps(ABC):
    """Merges the chunks of a call, one step at a time.

    Args:
        k: `[num_chunks, W, Hkv, K]` keys, contiguous. v: values.
        slots: `[num_chunks, Hkv, W]` int32, receives the slot of each token of a complete chunk.
        into: the dictionaries, updated in place.
        work: the chunks of the call and their order.
        weights: the token weights, or None.
    """

    def __init__(
        self, k: Tensor, v: Tensor, slots: Tensor, into: Dictionary, work: Work, weights: Weights | None
    ) -> None:
        self.k, self.v, self.slots, self.into, self.work = k, v, slots, into, work
        self._tokens = None if weights is None else weights.tokens
        self._kept = None if weights is None else weights.kept
        self._chunk_size = work.options.chunk_size
        self._fused = common.FUSED if weights is None else common.UNFUSED
        options = work.options
        self._format: dict[str, Any] = {
            "FORMAT": STATE_DTYPES.index(options.state_dtype),
            "HAS_MEANS": options.weighs_chunk,
        }

    def step(self, i: int, snapshots: Sequence[Tensor] | None = None, base: int = 0) -> None:
        """Merge chunk i - 1, write the dictionary that chunk i reads, and assign the tokens of chunk i.

        Args:
            i: the step. Either chunk may be missing; one extra step merges the last chunks.
            snapshots: receives the means and log2 masses; None if nothing is read.
            base: the entry at which `snapshots` start.
        """
        work, into = self.work, self.into
        has_next = i < work.num_steps
        num_next = work.num_active[i] if has_next else 0
        num_rows = max(work.num_complete[i - 1] if i else 0, num_next)
        if not (num_rows and work.capacity):
            return
        entries = (work.first[i - 1] if i else 0, work.first[i], base, num_next)
        parts = (into.key_sum, into.value_sum, into.count)
        flags = {"HAS_PREVIOUS": i > 0, "HAS_NEXT": has_next, "HAS_READ": snapshots is not None}
        tables = (*parts, work.table, *(snapshots or parts))
        self._advance(num_rows * work.num_kv_heads, tables, entries, flags | self._format)
        if has_next and work.num_complete[i]:
            self._assign(i)

    @abstractmethod
    def _advance(
        self, streams: int, tables: tuple[Tensor, ...], entries: tuple[int, ...], flags: dict[str, Any]
    ) -> None:
        """Merge the previous chunks and prepare the inputs of `_assign`, for this number of streams.

        `entries` are those of the first row: its chunk to merge, its chunk to assign and its dictionary among
        the stored ones; then the number of rows to assign.
        """

    @abstractmethod
    def _assign(self, i: int) -> None:
        """Assign the tokens of the complete chunks of a step to slots."""


class PairRecurrence(Steps):
    """`Steps` for `merge="nearest"`.

    Args:
        tensors: the arguments of `Steps`.
        merged: receives the slots merged into others.
        is_kept: whether `merged` has room for all chunks.
    """

    def __init__(self, *tensors: Any, merged: MergedSlots, is_kept: bool) -> None:
        super().__init__(*tensors)
        self._merged, self._is_kept, work, size = merged, is_kept, self.work, self._chunk_size
        self._columns = triton.cdiv(work.capacity + size, _ALIGNED) * _ALIGNED
        self._dims = (self.k.shape[-1], self.v.shape[-1])
        self._items = [self._empty(self._columns, dim, dtype=torch.float32) for dim in self._dims]
        self._ints = self._empty(INT_FIELDS.value, self._columns, dtype=torch.int32)
        self._masses = self._empty(self._columns, dtype=torch.float64)
        self._padded = {"BK": common.padded(self._dims[0]), "BV": common.padded(self._dims[1])}
        # Launch options of programs that process all columns of a stream.
        self._ranking = {
            "BL": triton.next_power_of_2(self._columns),
            "num_warps": 8 if self._columns <= 4096 else 16,
        }

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised buffer for each stream."""
        streams = max(1, self.work.num_active[0] * self.work.num_kv_heads)
        return torch.empty(streams, *shape, dtype=dtype, device=self.k.device)

    def _advance(
        self, streams: int, tables: tuple[Tensor, ...], entries: tuple[int, ...], flags: dict[str, Any]
    ) -> None:
        """As in `Steps`; writes the slot means as items."""
        work, k, v, kept = self.work, self.k, self.v, self._kept
        block = common.slot_block(k, v)
        kept_slots = (None,) * 4 if kept is None else (kept.slot, kept.keys, kept.values, kept.weight)
        advance_items[(streams, triton.cdiv(work.capacity, block))](
            k, v, self.slots, *tables, *self._merged, self._tokens, self.into.weight, *kept_slots,
            *self._items, self._masses, *entries, 0 if self._is_kept else entries[0],
            k.shape[1], self._chunk_size, work.num_kv_heads, *self._dims, work.capacity, self._columns,
            BN=block, BT=common.score_block(k), **flags, **self._padded, **self._fused, num_warps=8,
        )  # fmt: skip

    def _assign(self, i: int) -> None:
        """As in `Steps`; also lists the slots merged into others and copies their sums."""
        work, merged, entry = self.work, self._merged, self.work.first[i]
        heads, width, size = work.num_kv_heads, self.k.shape[1], self._chunk_size
        streams = work.num_complete[i] * heads
        base, first = 0 if self._is_kept else entry, max(work.before[i])
        prepare[(streams,)](
            self.k, self.v, self._tokens, work.table, *self._items, self._ints, self._masses, entry,
            width, size, heads, *self._dims, self._columns, first,
            BC=32, **self._ranking, **self._padded, **common.FUSED,
        )  # fmt: skip
        if work.num_due[i]:
            self._join(i, streams)
        settle[(streams,)](
            work.table, self._ints, self.into.count, self.into.weight, self.slots, merged.slot, merged.into,
            merged.num, merged.weight, None if self._kept is None else self._kept.slot,
            entry, base, width, size, heads, work.capacity, self._columns, first,
            **self._ranking, **common.FUSED,
        )  # fmt: skip
        keep[(streams, triton.cdiv(size, _KEPT))](
            self.into.key_sum, self.into.value_sum, merged.slot, merged.keys, merged.values, entry, base,
            size, heads, *self._dims, work.capacity, BN=_KEPT, **self._padded, **common.FUSED,
        )  # fmt: skip

    def _join(self, i: int, streams: int) -> None:
        """Merge items in a step with due merges: `INTO` of each item receives the lowest of its cluster."""
        work, size = self.work, self._chunk_size
        columns = max(work.before[i]) + size
        into = self._ints[:streams, INTO.value, :columns]
        count = (into >= 0).long()
        mass = self._masses[:streams, :columns].where(count > 0, 0)
        keys, values = (x[:streams, :columns] for x in self._items)
        before, merged, due = (
            [n for n in of_rows for _ in range(work.num_kv_heads)]
            for of_rows in (work.before[i], work.merged_before(i), work.due[i])
        )
        is_mover = movers(before, merged, size, into.device)
        at_once = max(1, PRODUCT_BYTES // (4 * 2 * size * columns))
        # A compiled graph may get here without the `full_precision` of the backend's `run`.
        with full_precision(into.device):
            for start in range(0, streams, at_once):
                own = slice(start, start + at_once)
                items = Items.of(
                    *(x[own] for x in (keys, values, mass, count)),
                    value_weight=work.options.value_weight,
                    mass_power=work.options.mass_power,
                )
                into[own] = nearest_roots(items, is_mover[own], due[own])
