"""`SequenceLayout`: padding and packing of a call, that is, its real tokens and the row of each.

A model checks its mask once per forward pass and passes the resulting `SequenceLayout` instead of the mask to
every layer. A layer used on its own builds its own layout.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.ops.call import RowBounds
from ovq.ops.checks import check_dense, checked_mask, has_data, masked_bounds, row_bounds
from ovq.ops.splits import alike


@dataclass(frozen=True, kw_only=True)
class SequenceLayout:
    """The columns of one call: `num_past` cached columns followed by `num_new` new ones.

    Build it with `SequenceLayout.of`, which validates its arguments.

    Attributes:
        num_past: cached columns P.
        num_new: columns T of this call.
        mask: `[B, P + T]` bool, True for a real token; None if all are real.
        new_mask: `[B, T]` bool, the part of `mask` for the new columns; None if all of those are real.
        cu_seqlens: `[R + 1]` offsets of the packed rows, or None.
        bounds: ranges of the new tokens of each row, for the op; None if all columns are real.
        has_mask: whether the caller gave a mask, even one without padding.

    Example:
        >>> SequenceLayout.of(torch.tensor([[0, 1, 1]]), batch_size=1, num_past=0, num_new=3).segments(3)
        tensor([[-1,  0,  0]])
    """

    num_past: int
    num_new: int
    mask: Tensor | None = None
    new_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    bounds: RowBounds | None = None
    has_mask: bool = False
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of(
        attention_mask: Tensor | SequenceLayout | None,
        *,
        batch_size: int,
        num_past: int,
        num_new: int,
        cu_seqlens: Tensor | None = None,
    ) -> SequenceLayout:
        """Check a padding mask or packed-row offsets.

        Args:
            attention_mask: `[B, P + T]` of 0 and 1, real tokens contiguous, padding left or right; or None;
                or a layout, which has been checked already and is returned as it is.
            batch_size: B.
            num_past: P, cached columns.
            num_new: T, columns of this call.
            cu_seqlens: `[R + 1]` integer offsets of rows packed into one (`B == 1`), as in FlashAttention.

        Raises:
            ValueError: if the mask has a wrong shape, other values, or a hole; if offsets do not partition
                the columns; if both mask and offsets are given; if packing is combined with a cache; if a
                layout has other columns.
        """
        if isinstance(attention_mask, SequenceLayout):
            attention_mask._check(batch_size, num_past, num_new)
            return attention_mask
        if cu_seqlens is not None:
            if attention_mask is not None:
                raise ValueError(
                    "expected attention_mask or cu_seqlens, found both: packed rows have no padding"
                )
            if num_past:
                raise ValueError(f"expected no cache with cu_seqlens, found {num_past} cached columns")
            bounds = RowBounds(row_bounds(None, cu_seqlens, batch_size, 0, num_new))
            return SequenceLayout(num_past=0, num_new=num_new, cu_seqlens=cu_seqlens, bounds=bounds)
        if attention_mask is None:
            return SequenceLayout(num_past=num_past, num_new=num_new)
        return _masked_layout(attention_mask, batch_size, num_past, num_new)

    def _check(self, batch_size: int, num_past: int, num_new: int) -> None:
        """Raise ValueError if a call has other columns: kernels would read beyond those of the layout."""
        rows = batch_size if self.mask is None else len(self.mask)
        own = 1 if self.cu_seqlens is not None else rows, self.num_past, self.num_new
        # A graph would be made anew for each number of cached columns of each layer.
        past = self.num_past if torch.compiler.is_compiling() else num_past
        if own != (batch_size, past, num_new):
            raise ValueError(
                f"expected a layout of {batch_size} rows with {past} cached and {num_new} new columns, "
                "found one of {} rows with {} and {}".format(*own)
            )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> SequenceLayout:
        """The layout on another device; accelerate calls this for the inputs of a layer.

        The bounds of rows stay on the CPU, as they determine the kernel launches.
        """
        return replace(
            self,
            **{
                name: tensor.to(device, non_blocking=non_blocking)
                for name in ("mask", "new_mask", "cu_seqlens")
                if (tensor := getattr(self, name)) is not None
            },
        )

    def once(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Result of `make`, computed once per `name` and shared by all layers of the call."""
        if torch.compiler.is_compiling():
            return make()
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def first_seen(self, num_keys: int) -> Tensor | None:
        """First column, of the last `num_keys`, in each new token's row, `[B, T]`; None if always 0.

        Example:
            >>> layout = SequenceLayout.of(torch.tensor([[0, 1, 1]]), batch_size=1, num_past=0, num_new=3)
            >>> layout.first_seen(3)
            tensor([[0, 1, 1]])
        """
        segments = self.segments(num_keys)
        if segments is None:
            return None
        column = torch.arange(num_keys, device=segments.device)
        is_start = F.pad(segments.diff() != 0, (1, 0), value=True)
        starts = torch.where(is_start, column, 0).cummax(1).values
        return starts[:, num_keys - self.num_new :].contiguous()

    def segments(self, num_keys: int) -> Tensor | None:
        """Row of each of the last `num_keys` columns, `[B, num_keys]`, -1 at padding; None if always 0."""
        if self.cu_seqlens is not None:
            return self.row_index()[None, -num_keys:]
        if self.mask is None:
            return None
        return self.mask[:, -num_keys:].long() - 1

    def positions(self, device: torch.device) -> Tensor:
        """Positions for the rotary embedding of new queries and keys, `[T]` int64.

        They are column indices, or offsets in packed rows: only differences within a row matter. If rows of
        different lengths are continued in one call, a subclass that knows their positions returns those.

        Example:
            >>> SequenceLayout.of(None, batch_size=1, num_past=5, num_new=2).positions(torch.device("cpu"))
            tensor([5, 6])
        """
        if self.cu_seqlens is not None:
            return self.offset_in_row().to(device)
        return torch.arange(self.num_past, self.num_past + self.num_new, device=device)

    def places(self, num_seen: Tensor | None = None) -> Tensor:
        """Place of each new token in its row, from 1: `[B, T]` int64, or `[1, T]` if all rows are alike.

        Places of padding are arbitrary.

        Args:
            num_seen: `[B]` number of tokens that each row has read, from a state that counts them. None:
                counted from the cached columns, some of which may be dropped (`LayerCache.drop_columns`).

        Example:
            >>> layout = SequenceLayout.of(torch.tensor([[0, 1, 1]]), batch_size=1, num_past=1, num_new=2)
            >>> layout.places()
            tensor([[1, 2]])
        """
        if num_seen is None:
            return self.once("places", self._places)
        first = 0 if self.new_mask is None else self.new_mask.int().argmax(1).to(num_seen.device)
        places = torch.arange(1, self.num_new + 1, device=num_seen.device)
        return places + (num_seen - first)[:, None]

    def _places(self) -> Tensor:
        if self.cu_seqlens is not None:
            return self.offset_in_row()[None] + 1
        device = "cpu" if self.mask is None else self.mask.device
        columns = torch.arange(self.num_past, self.num_past + self.num_new, device=device)[None]
        return columns + 1 if self.mask is None else columns + 1 - self.mask.int().argmax(1)[:, None]

    def rows(self) -> LeftAlignedRows:
        """Left-aligned new tokens of each row, for mixers of whole rows; they run `in_groups`."""
        if self.cu_seqlens is not None:
            assert self.bounds is not None, "they come with the offsets of packed rows"
            lengths = self.cu_seqlens.diff()
            column = torch.arange(int(self.bounds.bounds[1].max()), device=lengths.device)
            mask = column < lengths[:, None]
            source = (self.cu_seqlens[:-1, None] + column).clamp(max=self.num_new - 1)
            target = self.row_index() * len(column) + self.offset_in_row()
            return LeftAlignedRows(mask, source, target[None])
        if self.new_mask is None:
            return LeftAlignedRows()
        batch_size, column = len(self.new_mask), torch.arange(self.num_new, device=self.new_mask.device)
        lengths, first = self.new_mask.sum(1), self.new_mask.int().argmax(1)
        row = torch.arange(batch_size, device=column.device)[:, None] * self.num_new
        source = row + (first[:, None] + column).clamp(max=self.num_new - 1)
        target = row + (column - first[:, None]).clamp(min=0)
        return LeftAlignedRows(column < lengths[:, None], source, target)

    def in_groups(self, run: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
        """`run(*tokens, self)`, or with packed rows of very different lengths several such calls.

        In one call, `rows` would give each of them as many columns as the longest has. Not for calls with a
        cache.

        Args:
            run: maps tokens and their layout to outputs `[B, T, ...]`, each row by itself.
            tokens: `[B, T, ...]` each.
        """
        device = None if self.cu_seqlens is None else self.cu_seqlens.device
        groups = self.once(("groups", device), self._groups)
        if groups is None:
            return run(*tokens, self)
        order, places, layouts = groups
        # Split, because the gradient of an index, taken once per group, would be as large as all tokens.
        parts = (x.index_select(1, order).split([part.num_new for part in layouts], 1) for x in tokens)
        outputs = [run(*own) for own in zip(*parts, layouts, strict=True)]
        return torch.cat(outputs, 1).index_select(1, places)

    def _groups(self) -> tuple[Tensor, Tensor, list[SequenceLayout]] | None:
        """Columns `[T]` in the order of the groups of `in_groups`, the place of each there, and the groups'
        layouts; None for one call."""
        if self.cu_seqlens is None or self.bounds is None or torch.compiler.is_compiling():
            return None
        lengths = self.bounds.bounds[1]
        groups, device = alike(lengths.tolist()), self.cu_seqlens.device
        if len(groups) == 1:
            return None
        columns = torch.arange(self.num_new).split(lengths.tolist())
        order = torch.cat([columns[row] for group in groups for row in group])
        layouts = []
        for group in groups:
            ends = F.pad(lengths[group].cumsum(0), (1, 0))
            # A group of empty rows has no columns.
            if num_new := int(ends[-1]):
                part = SequenceLayout.of(None, batch_size=1, num_past=0, num_new=num_new, cu_seqlens=ends)
                layouts.append(part.to(device))
        return order.to(device), order.argsort().to(device), layouts

    def row_index(self) -> Tensor:
        """Packed row of each new column, `[T]` int64 (only with `cu_seqlens`)."""
        assert self.cu_seqlens is not None
        lengths = self.cu_seqlens.diff()
        rows = torch.arange(len(lengths), device=lengths.device)
        return rows.repeat_interleave(lengths, output_size=self.num_new)

    def offset_in_row(self) -> Tensor:
        """Offset of each new column in its packed row, `[T]` int64 (only with `cu_seqlens`)."""
        assert self.cu_seqlens is not None
        columns = torch.arange(self.num_new, device=self.cu_seqlens.device)
        return columns - self.cu_seqlens[:-1][self.row_index()]


@dataclass(frozen=True)
class LeftAlignedRows:
    """Converts between the layout of a call and rows that start in column 0, padded only on the right.

    Without padding and packing, both directions are the identity and `mask` is None.

    Attributes:
        mask: `[R, L]` bool, True for a real token; None if all are real.
        source: `[R, L]` index in `[B * T]` of each token of the aligned rows.
        target: `[B, T]` index in `[R * L]` of each column of the call; arbitrary for padding.

    Example:
        >>> layout = SequenceLayout.of(torch.tensor([[0, 1, 1]]), batch_size=1, num_past=0, num_new=3)
        >>> rows = layout.rows()
        >>> rows.take(torch.tensor([[7, 8, 9]])), rows.put(rows.take(torch.tensor([[7, 8, 9]])))
        (tensor([[8, 9, 0]]), tensor([[8, 8, 9]]))
    """

    mask: Tensor | None = None
    source: Tensor | None = None
    target: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to the aligned `[R, L, ...]`, zero at padding."""
        if self.mask is None:
            return x
        rows = x.flatten(0, 1)[self.source]
        return rows.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (x.dim() - 2)), 0)

    def put(self, rows: Tensor) -> Tensor:
        """`[R, L, ...]` back to `[B, T, ...]`; padding columns get values of some token of their row."""
        return rows if self.mask is None else rows.flatten(0, 1)[self.target]

    def lengths(self, rows: Tensor) -> Tensor:
        """Number of real tokens of each row, `[R]` int64; `rows` is an aligned tensor `[R, L, ...]`."""
        if self.mask is not None:
            return self.mask.sum(1)
        return torch.full(rows.shape[:1], rows.shape[1], device=rows.device)


def _masked_layout(mask: Tensor, batch_size: int, num_past: int, num_new: int) -> SequenceLayout:
    """The layout for a mask; ValueError if the mask is invalid."""
    expected = [batch_size, num_past + num_new]
    if not isinstance(mask, Tensor) or list(mask.shape) != expected:
        found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"expected an attention_mask of shape [batch, cached + new] = {expected} "
            f"({num_past} columns are cached), found {found}"
        )
    columns: dict[str, Any] = {"num_past": num_past, "num_new": num_new, "has_mask": True}
    if torch.compiler.is_compiling() or not has_data(mask):
        # A compiled graph must serve any mask, so it assumes padding.
        bounds, real = RowBounds(row_bounds(mask, None, batch_size, num_past, num_new)), mask.bool()
        return SequenceLayout(**columns, mask=real, new_mask=real[:, num_past:], bounds=bounds)
    check_dense("attention_mask", mask)
    if mask.device.type == "cpu" and bool((mask == 1).all()):
        # Fast path for masks of ones, which grow with every decode step: one pass over the mask.
        return SequenceLayout(**columns)
    # Checked on the CPU, with a single synchronisation with the device.
    host, real = checked_mask(mask), mask.bool()
    # Batches without padding often have a mask of ones; they use the cheaper unmasked code.
    if not bool(host.all()):
        columns["mask"] = real
    if not bool((new := host[:, num_past:]).all()):
        columns |= {"new_mask": real[:, num_past:], "bounds": RowBounds(masked_bounds(new))}
    return SequenceLayout(**columns)
