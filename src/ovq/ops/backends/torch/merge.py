"""Merging a chunk into the dictionary in the `torch` backend, and undoing it in the backward.

`route.py` assigns keys to slots, `ovq.ops.nearest` selects the pairs to merge; this file updates the sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.torch.route import Router
from ovq.ops.backends.torch.streams import CompleteChunk
from ovq.ops.narrow import rounded_
from ovq.ops.nearest import Items, movers, nearest_roots
from ovq.ops.options import Options
from ovq.ops.sums import slot_means, without_trace


class ChangedSlots(NamedTuple):
    """Slots before a chunk changed them, saved so that the backward can undo the change.

    Without token weights, these are the slots that were merged into others; subtraction undoes the rest. With
    token weights, they are all changed slots: subtracting a token from a float32 sum leaves a rounding error,
    which may exceed everything that a slot of small weight contained before.

    Attributes:
        source: `[P]` slots that were merged into others, as rows of the flattened dictionaries `[S * M]`.
        target: `[P]` the slots that they were merged into.
        saved: `[Q]` the saved slots, likewise.
        key_sum: `[Q, K]` their sums. value_sum: `[Q, V]`. num_tokens: `[Q]` their counts.
        weight: `[Q]`; None without token weights.
    """

    source: Tensor
    target: Tensor
    saved: Tensor
    key_sum: Tensor
    value_sum: Tensor
    num_tokens: Tensor
    weight: Tensor | None

    @classmethod
    def of(cls, sums: Dictionary, slots: Tensor, source: Tensor, target: Tensor) -> ChangedSlots:
        """Copies of the slots to save, if tokens go to `slots` `[S, C]`."""
        if sums.weight is None:
            saved, weight = source, None
        else:
            saved = torch.cat([sums.index(slots), source, target]).unique()
            weight = sums.weight.view(-1)[saved]
        key_sum, value_sum = (x.view(-1, x.shape[-1])[saved] for x in (sums.key_sum, sums.value_sum))
        return cls(source, target, saved, key_sum, value_sum, sums.count.view(-1)[saved], weight)

    def restore_(self, sums: Dictionary, deposits: Dictionary) -> None:
        """Restore the slots in place; each part of a merged slot gets the gradient of the merged sum.

        Without token weights, the tokens have been subtracted before.
        """
        for total, before in zip(
            sums.tensors, (self.key_sum, self.value_sum, self.num_tokens, self.weight), strict=True
        ):
            if total is None or before is None:
                continue
            rows = total.view(-1, *total.shape[2:])
            if self.weight is None:
                rows.index_add_(0, self.target, before, alpha=-1)
            rows[self.saved] = before
        for grad in (deposits.key_sum, deposits.value_sum, deposits.weight):
            if grad is not None:
                rows = grad.view(-1, *grad.shape[2:])
                rows[self.source] = rows[self.target]


def merge_chunk(
    sums: Dictionary, chunk: CompleteChunk, options: Options, router: Router, means: Tensor
) -> tuple[Tensor, ChangedSlots | None]:
    """Merge a complete chunk into the dictionaries, in place.

    Args:
        sums: dictionaries `[S', M, ...]`; streams beyond the S of the chunk do not change.
        options: the layer's settings.
        router: assigns keys to slots; not used by rules that merge pairs.
        means: `[S, padded M, K]` means of all slots, zero beyond those in use; may be overwritten.

    Returns:
        The slot of each token, `[S, C]`, and what the backward needs to undo the merge, or None.
    """
    source = target = chunk.keys.new_empty(0, dtype=torch.int64)
    if options.merges_pairs:
        slots, source, target = _merged_pairs(sums, chunk, options, means)
    else:
        slots = router(chunk, means, sums.weight)
    changed = None
    if options.merges_pairs or sums.weight is not None:
        changed = ChangedSlots.of(sums, slots, source, target)
    for x in sums.tensors if len(source) else ():
        if x is not None:
            rows = x.view(-1, *x.shape[2:])
            rows.index_add_(0, target, rows[source])
            rows[source] = 0
    sums.add_(slots, chunk.keys, chunk.values, 1, chunk.weights)
    weight = sums.mass[: len(slots)] if options.weighs_chunk else None
    for x in (sums.key_sum, sums.value_sum):
        rounded_(x[: len(slots)], options.state_dtype, weight)
    return slots, changed


def _merged_pairs(
    sums: Dictionary, chunk: CompleteChunk, options: Options, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Slot assignments by a rule that merges pairs.

    Returns:
        The slot of each token, `[S, C]`; the slots that are merged into others, and their target slots, as
        rows of the flattened dictionaries.
    """
    num_streams, size = chunk.keys.shape[:2]
    capacity, most = sums.count.shape[1], max(chunk.before)
    count = sums.count[:num_streams, :most]
    # Items are the slots, then the tokens.
    counts = torch.cat([count, count.new_ones(num_streams, size)], 1)
    due = [n + size - m for n, m in zip(chunk.before, chunk.step.after, strict=True)]
    roots = torch.arange(counts.shape[1], device=counts.device).repeat(num_streams, 1)
    if any(due):
        mass, weights = sums.mass[:num_streams, :most], counts
        keys, values = chunk.keys, chunk.values
        if chunk.weights is not None:
            weights = torch.cat([mass, chunk.weights], 1)
            keys, values = (without_trace(x, chunk.weights) for x in (keys, values))
        keys = torch.cat([means[:num_streams, :most], keys], 1)
        values = torch.cat([slot_means(sums.value_sum[:num_streams, :most], mass), values], 1)
        items = Items.of(
            keys, values, weights, counts, value_weight=options.value_weight, mass_power=options.mass_power
        )
        num_merged = [t - size for t in chunk.step.num_seen]
        roots = nearest_roots(items, movers(chunk.before, num_merged, size, counts.device), due)
    slots = _homes(roots, counts > 0, most)
    source, target = slots[:, :most], torch.arange(most, device=slots.device)
    stream, slot = ((source != target) & (count > 0)).nonzero(as_tuple=True)
    first = stream * capacity
    return slots[:, most:].contiguous(), first + slot, first + slots[stream, slot]


def _homes(roots: Tensor, is_there: Tensor, num_slots: int) -> Tensor:
    """Slot `[S, M]` of each item: the lowest slot of its cluster, or a free slot if the cluster has none.

    Clusters without slots take the free slots in the order of their first tokens.
    """
    index = torch.arange(roots.shape[1], device=roots.device)
    is_kept = (roots == index) & is_there
    is_free = ~is_kept
    # All places beyond the earlier slots are free.
    is_free[:, num_slots:] = True
    free = (~is_free).byte().argsort(dim=-1, stable=True)
    is_new = is_kept & (index >= num_slots)
    place = free.gather(1, (is_new.cumsum(-1) - 1).clamp(min=0))
    return torch.where(is_new, place, index).gather(1, roots)
