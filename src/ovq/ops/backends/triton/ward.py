"""merge="ward" and "ward-sqrt": which kernels merge the chunks of a call, and in which order.

For each step: `advance_items` merges chunk i - 1 into the slots, writes the dictionary that chunk i reads,
and the means as items; `prepare` adds the tokens. `estimate_all` and `refine` bound the costs of all pairs.
Rounds of `merge_pairs`, `estimate` and `refine` merge most of what is due, and `finish` the rest, so
that the host waits for nothing. `settle` says where tokens go and which slots leave, `keep` what was in them.

By "ward-sqrt", and by both rules where tokens have weights, `bound_pairs` and `find_nearest` take the place
of the first two, and `merge_one_by_one` that of all rounds.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.triton import common
from ovq.ops.backends.triton.items import INT_FIELDS, NUM_FIELDS, advance_items, keep, prepare, settle
from ovq.ops.backends.triton.one_by_one import bound_pairs, find_nearest, merge_one_by_one
from ovq.ops.backends.triton.pairs import estimate, estimate_all, refine
from ovq.ops.backends.triton.rounds import finish, merge_pairs
from ovq.ops.backends.triton.weights import Weights
from ovq.ops.backends.triton.work import At, Work

# Rounds in which all programs of the GPU take part; one program per stream makes those that are left.
ROUNDS = 12
# Items that a round refines beyond those that it must.
AHEAD = 128
# Pairs of a tile of products, by side, and columns of a group, of which one bound is kept for each item. The
# bounds grow with the square of the slots, so that groups of large dictionaries are larger.
TILE = 64
GROUPS = ((4096, 16), (1 << 30, 64))
# Items refined at once, per multiprocessor; items of a tile whose bounds are computed anew, and how many such
# tiles of a stream at once.
REFINED_EACH = 8
_ROWS = 32
_ESTIMATED = 6
# One merge after the other: bytes of the tables of all pairs that are held at once, or of one if that is
# larger; costs computed for an item before the first merge.
TABLE_BYTES = 2 << 30
_COSTS_EACH = 4
# Slots that one program keeps, and columns merged side by side.
_KEPT = 16


@dataclasses.dataclass
class Gone:
    """Slots that chunks merged into others, as the backward needs them to undo the merges.

    Attributes:
        slot: `[entries, Hkv, C]` int32 slots, -1 after the last; a chunk makes at most C merges.
        into: `[entries, Hkv, C]` int32 slots that they were merged into.
        count: `[entries, Hkv, C]` int64 tokens in them.
        keys: `[entries, Hkv, C, K]` float32 sums of them. values: `[entries, Hkv, C, V]`.
        weight: `[entries, Hkv, C]` float32 total weight of the tokens; None where these have none.
    """

    slot: Tensor
    into: Tensor
    count: Tensor
    keys: Tensor
    values: Tensor
    weight: Tensor | None = None

    @classmethod
    def empty(cls, work: Work, k: Tensor, v: Tensor, *, is_kept: bool, has_weights: bool = False) -> Gone:
        """Room for all chunks of a call if they are kept, else for those of a step."""
        num = work.first[-1] if is_kept else work.num_active[0]
        shape = (num, work.num_kv_heads, work.options.chunk_size)

        def empty(*dims: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*shape, *dims, dtype=dtype, device=k.device)

        slot, into = empty(dtype=torch.int32), empty(dtype=torch.int32)
        keys, values = (empty(x.shape[-1], dtype=torch.float32) for x in (k, v))
        weight = empty(dtype=torch.float32) if has_weights else None
        return cls(slot, into, empty(dtype=torch.int64), keys, values, weight)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The attributes, in order."""
        return self.slot, self.into, self.count, self.keys, self.values, self.weight


class WardRecurrence:
    """Merges the chunks of a call, one step at a time.

    Args:
        k: `[num_chunks, W, Hkv, K]` keys, contiguous. v: values.
        slots: `[num_chunks, Hkv, W]` int32, receives the slot of each token of a complete chunk.
        into: the dictionaries, updated in place.
        work: the chunks of the call and their order.
        gone: receives the slots merged into others.
        is_kept: whether `gone` has room for all chunks.
        weights: of the tokens; None without.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        slots: Tensor,
        into: Dictionary,
        work: Work,
        gone: Gone,
        *,
        is_kept: bool,
        weights: Weights | None = None,
    ) -> None:
        self.k, self.v, self.slots, self.into, self.work = k, v, slots, into, work
        self._gone, self._is_kept = gone, is_kept
        self._tokens = None if weights is None else weights.tokens
        self._kept = None if weights is None else weights.kept
        self._chunk_size = work.options.chunk_size
        self._first_token = triton.cdiv(work.capacity, TILE) * TILE
        self._last = triton.cdiv(self._chunk_size, TILE) * TILE
        self._is_sqrt = work.options.merge == "ward-sqrt"
        self._is_one_by_one = self._is_sqrt or weights is not None
        # One by one, merged items have no columns of their own.
        self._columns = columns = self._first_token + (1 if self._is_one_by_one else 2) * self._last
        self._group = next(group for most, group in GROUPS if columns <= most)
        streams = max(1, work.num_active[0] * work.num_kv_heads)
        dims = (k.shape[-1], v.shape[-1])

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(streams, *shape, dtype=dtype, device=k.device)

        items = [empty(columns, dim, dtype=torch.float32) for dim in dims]
        wide = [empty(self._last, dim, dtype=torch.float64) for dim in dims]
        ints = empty(INT_FIELDS.value, columns, dtype=torch.int32)
        nums = empty(NUM_FIELDS.value, columns, dtype=torch.float64)
        self._items, self._ints, self._nums = items, ints, nums
        self._merging = (*items, *wide, ints, nums)
        # Bounds of costs: of all pairs of some streams, or of the groups of all.
        self._at_once = min(streams, max(1, TABLE_BYTES // (4 * columns * columns)))
        if self._is_one_by_one:
            shape = (self._at_once, columns, columns)
            self._low = torch.empty(shape, dtype=torch.float32, device=k.device)
        else:
            self._low = empty(columns, columns // self._group, dtype=torch.float32)
        factor = work.options.value_weight**2
        self._factor = torch.full((1,), factor, dtype=torch.float64, device=k.device)

    def step(self, i: int, shown: tuple[Tensor, Tensor, Tensor] | None = None, at: At | None = None) -> None:
        """Merge chunk i - 1, keep the dictionary that chunk i reads and decide what chunk i merges.

        Args:
            i: the step; one more step after the last chunk merges the last chunks.
            shown: receives the means and log2 counts; None if nothing is read.
            at: where the step finds its chunks; None: numbers, and `shown` begins with entry 0.
        """
        work, k, v, into, gone = self.work, self.k, self.v, self.into, self._gone
        has_next = i < work.num_steps
        num_next = work.num_active[i] if has_next else 0
        num_rows = max(work.num_complete[i - 1] if i else 0, num_next)
        if not (num_rows and work.capacity):
            return
        at = work.at(i) if at is None else at
        heads, width, dims = work.num_kv_heads, k.shape[1], (k.shape[-1], v.shape[-1])
        fused = common.FUSED if self._tokens is None else common.UNFUSED
        padded = {"BK": common.padded(dims[0]), "BV": common.padded(dims[1]), **fused}
        block = common.slot_block(k, v)
        kept = self._kept
        kept_slots = (None,) * 4 if kept is None else (kept.slot, kept.keys, kept.values, kept.weight)
        parts = (into.key_sum, into.value_sum, into.count)
        advance_items[(num_rows * heads, triton.cdiv(work.capacity, block))](
            k, v, self.slots, *parts, work.table, *(shown or parts),
            *gone.tensors(), self._tokens, into.weight, *kept_slots, *self._items, self._nums,
            *at, num_next, 0 if self._is_kept else at.previous,
            width, self._chunk_size, heads, *dims, work.capacity, self._columns,
            HAS_PREVIOUS=i > 0, HAS_NEXT=has_next, HAS_READ=shown is not None,
            BN=block, BT=common.score_block(k), **padded, num_warps=8,
        )  # fmt: skip
        if has_next and work.num_complete[i]:
            self._decide(i, at.current)

    def _decide(self, i: int, entry: int | Tensor) -> None:
        """Decide where the tokens of a complete chunk go and which slots leave."""
        work, gone = self.work, self._gone
        heads, width, size = work.num_kv_heads, self.k.shape[1], self._chunk_size
        dims = (self.k.shape[-1], self.v.shape[-1])
        streams = work.num_complete[i] * heads
        padded = {"BK": common.padded(dims[0]), "BV": common.padded(dims[1]), **common.FUSED}
        # A program that ranks all columns of a stream.
        ranking = {
            "BL": triton.next_power_of_2(self._columns),
            "num_warps": 8 if self._columns <= 4096 else 16,
        }
        base = 0 if self._is_kept else entry
        prepare[(streams,)](
            self.k, self.v, self._tokens, work.table, *self._items, self._ints, self._nums, entry,
            self._factor, width, size, heads, *dims, self._columns, self._first_token,
            BC=32, **ranking, **padded,
        )  # fmt: skip
        if work.num_due[i] and self._is_one_by_one:
            self._merge_one_by_one(streams, dims, padded, ranking)
        elif work.num_due[i]:
            self._merge(streams, dims, padded, ranking)
        settle[(streams,)](
            work.table, self._ints, self.into.count, self.into.weight, self.slots, gone.slot, gone.into,
            gone.count, gone.weight, None if self._kept is None else self._kept.slot,
            entry, base, width, size, heads, work.capacity, self._columns, self._first_token,
            **ranking, **common.FUSED,
        )  # fmt: skip
        keep[(streams, triton.cdiv(size, _KEPT))](
            self.into.key_sum, self.into.value_sum, gone.slot, gone.keys, gone.values, entry, base,
            size, heads, *dims, work.capacity, BN=_KEPT, **padded,
        )  # fmt: skip

    def _merge(
        self, streams: int, dims: tuple[int, int], padded: dict[str, int], ranking: dict[str, int]
    ) -> None:
        """Merge pairs until the items of every stream fit."""
        low, columns, last = self._low, self._columns, self._last
        groups = {"GROUP": self._group, **padded}
        found = {"BG": triton.next_power_of_2(columns // self._group), **groups}
        tiles = {"TILE": TILE, **groups, "num_warps": 8}
        rounds = {"BQ": _KEPT, **ranking, **padded}
        num_tiles = columns // TILE
        num_originals = num_tiles - last // TILE
        shared = max(1, min(columns, common.programs(low.device, REFINED_EACH) // streams))
        bounding = (*self._items, self._ints, self._nums, low, *dims, columns, self._first_token, last)
        refining = (*self._merging, low, *dims, columns, self._first_token, last)
        estimate_all[(streams, num_originals, num_originals)](*bounding, **tiles)
        refine[(streams, shared)](*refining, **found)
        for _ in range(ROUNDS):
            merge_pairs[(streams,)](*self._merging, *dims, columns, last, AHEAD=AHEAD, **rounds)
            estimate[(streams, min(shared, _ESTIMATED), num_tiles)](*bounding, ROWS=_ROWS, **tiles)
            refine[(streams, shared)](*refining, **found)
        finish[(streams,)](*refining, AHEAD=AHEAD // 4, ROWS=_ROWS, TILE=TILE, **{**found, **rounds})

    def _merge_one_by_one(
        self, streams: int, dims: tuple[int, int], padded: dict[str, int], ranking: dict[str, int]
    ) -> None:
        """The same one merge after the other, for as many streams at once as have tables."""
        columns, num_tiles = self._columns, self._columns // TILE
        tables = (self._ints, self._nums, self._low)
        looking = {**ranking, "num_warps": ranking["num_warps"] // 2}
        rule = {"IS_SQRT": self._is_sqrt}
        shared = max(1, min(columns, common.programs(self._low.device, REFINED_EACH) // self._at_once))
        for base in range(0, streams, self._at_once):
            num = min(self._at_once, streams - base)
            bound_pairs[(num, num_tiles, num_tiles)](
                *self._items, *tables, base, *dims, columns, self._first_token,
                HAS_WEIGHTS=self._tokens is not None, TILE=TILE, **rule, **padded, num_warps=8,
            )  # fmt: skip
            merging = (*self._merging, self._low, base, *dims, columns, self._last)
            find_nearest[(num, shared)](*merging, MOST=_COSTS_EACH, **rule, **looking, **padded)
            merge_one_by_one[(num,)](*merging, **rule, **ranking, **padded)
