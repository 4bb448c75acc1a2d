"""merge="ward" and "ward-sqrt": kernels decide which pairs are merged, the cheapest first.

`estimate_all` and `refine` bound the costs of all pairs of the items that `merging.py` lays out. Rounds of
`merge_pairs`, `estimate` and `refine` merge most of what is due, and `finish` the rest, so that the host
waits for nothing.

By "ward-sqrt", and by both rules where tokens have weights, `bound_pairs` and `find_nearest` take the place
of the first two, and `merge_one_by_one` that of all rounds.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.triton import common
from ovq.ops.backends.triton.merging import Gone, PairRecurrence
from ovq.ops.backends.triton.one_by_one import bound_pairs, find_nearest, merge_one_by_one
from ovq.ops.backends.triton.pairs import estimate, estimate_all, refine
from ovq.ops.backends.triton.rounds import finish, merge_pairs
from ovq.ops.backends.triton.weights import Weights
from ovq.ops.backends.triton.work import Work

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
# Columns merged side by side.
_BESIDE = 16


class WardRecurrence(PairRecurrence):
    """`PairRecurrence` by these rules; items are `[slots | tokens | merged]`, each in whole tiles."""

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
        self._first, self._last = (
            triton.cdiv(num, TILE) * TILE for num in (work.capacity, work.options.chunk_size)
        )
        self._is_sqrt = work.options.merge == "ward-sqrt"
        self._is_one_by_one = self._is_sqrt or weights is not None
        # One by one, merged items have no columns of their own.
        columns = self._first + (1 if self._is_one_by_one else 2) * self._last
        super().__init__(k, v, slots, into, work, gone, is_kept=is_kept, weights=weights, columns=columns)
        self._group = next(group for most, group in GROUPS if columns <= most)
        wide = [self._empty(self._last, dim, dtype=torch.float64) for dim in self._dims]
        self._merging = (*self._items, *wide, self._ints, self._nums)
        # Bounds of costs: of all pairs of some streams, or of the groups of all.
        self._at_once = min(len(self._ints), max(1, TABLE_BYTES // (4 * columns * columns)))
        if self._is_one_by_one:
            shape = (self._at_once, columns, columns)
            self._low = torch.empty(shape, dtype=torch.float32, device=k.device)
        else:
            self._low = self._empty(columns, columns // self._group, dtype=torch.float32)

    def _first_token(self, i: int) -> int:
        return self._first

    def _join(self, i: int, streams: int) -> None:
        if self._is_one_by_one:
            self._merge_one_by_one(streams)
        else:
            self._merge(streams)

    def _merge(self, streams: int) -> None:
        """Merge pairs until the items of every stream fit."""
        low, columns, last, dims = self._low, self._columns, self._last, self._dims
        padded = {**self._padded, **common.FUSED}
        groups = {"GROUP": self._group, **padded}
        found = {"BG": triton.next_power_of_2(columns // self._group), **groups}
        tiles = {"TILE": TILE, **groups, "num_warps": 8}
        rounds = {"BQ": _BESIDE, **self._ranking, **padded}
        num_tiles = columns // TILE
        num_originals = num_tiles - last // TILE
        shared = max(1, min(columns, common.programs(low.device, REFINED_EACH) // streams))
        bounding = (*self._items, self._ints, self._nums, low, *dims, columns, self._first, last)
        refining = (*self._merging, low, *dims, columns, self._first, last)
        estimate_all[(streams, num_originals, num_originals)](*bounding, **tiles)
        refine[(streams, shared)](*refining, **found)
        for _ in range(ROUNDS):
            merge_pairs[(streams,)](*self._merging, *dims, columns, last, AHEAD=AHEAD, **rounds)
            estimate[(streams, min(shared, _ESTIMATED), num_tiles)](*bounding, ROWS=_ROWS, **tiles)
            refine[(streams, shared)](*refining, **found)
        finish[(streams,)](*refining, AHEAD=AHEAD // 4, ROWS=_ROWS, TILE=TILE, **{**found, **rounds})

    def _merge_one_by_one(self, streams: int) -> None:
        """The same one merge after the other, for as many streams at once as have tables."""
        columns, num_tiles, dims = self._columns, self._columns // TILE, self._dims
        padded, ranking = {**self._padded, **common.FUSED}, self._ranking
        tables = (self._ints, self._nums, self._low)
        looking = {**ranking, "num_warps": ranking["num_warps"] // 2}
        rule = {"IS_SQRT": self._is_sqrt}
        shared = max(1, min(columns, common.programs(self._low.device, REFINED_EACH) // self._at_once))
        for base in range(0, streams, self._at_once):
            num = min(self._at_once, streams - base)
            bound_pairs[(num, num_tiles, num_tiles)](
                *self._items, *tables, base, *dims, columns, self._first,
                HAS_WEIGHTS=self._tokens is not None, TILE=TILE, **rule, **padded, num_warps=8,
            )  # fmt: skip
            merging = (*self._merging, self._low, base, *dims, columns, self._last)
            find_nearest[(num, shared)](*merging, MOST=_COSTS_EACH, **rule, **looking, **padded)
            merge_one_by_one[(num,)](*merging, **rule, **ranking, **padded)
