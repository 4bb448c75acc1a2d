"""Rules that merge pairs, in the `torch` backend: a chunk is merged, and the backward undoes merges of slots.

`ovq.ops.ward` decides which items are merged; this file updates the sums.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.options import Options
from ovq.ops.state import slot_means
from ovq.ops.ward import cluster_roots, pair_points


@dataclasses.dataclass(frozen=True)
class MergedSlots:
    """Slots that a chunk merged into others, as the backward needs them to undo the merges.

    Attributes:
        source: `[P]` the merged slots, as rows of the flattened dictionaries `[S * M]`.
        target: `[P]` the slots that they were merged into.
        key_sum: `[P, K]` sums of the merged slots. value_sum: `[P, V]`. count: `[P]`.
    """

    source: Tensor
    target: Tensor
    key_sum: Tensor
    value_sum: Tensor
    count: Tensor


def learn_by_likelihood(
    sums: Dictionary, keys: Tensor, values: Tensor, before: list[int], after: list[int], options: Options
) -> tuple[Tensor, MergedSlots]:
    """Merge the cheapest pairs of slots and tokens of a complete chunk until they fit, in place.

    Args:
        sums: dictionaries `[S, M, ...]`; streams beyond those of the tokens stay as they are.
        keys: `[S', C, K]` in the dtype of the sums. values: `[S', C, V]`.
        before: slots in use in each of the S' streams. after: slots that they are to have.
        options: the layer's settings.

    Returns:
        The slot of each token, `[S', C]`, and the slots merged into others.
    """
    num_streams, size = keys.shape[:2]
    capacity, most = sums.count.shape[1], max(before)
    count = sums.count[:num_streams, :most]
    items = torch.cat([count, count.new_ones(num_streams, size)], 1)
    all_keys, all_values = (
        torch.cat([slot_means(part[:num_streams, :most], count), tokens], 1)
        for part, tokens in ((sums.key_sum, keys), (sums.value_sum, values))
    )
    points = pair_points(all_keys, all_values, items, options.value_weight)
    due = [n + size - m for n, m in zip(before, after, strict=True)]
    roots = cluster_roots(points, items, due, count_power=options.count_power)
    slots = _homes(roots, items > 0, most)
    source, target = slots[:, :most], torch.arange(most, device=keys.device)
    stream, slot = ((source != target) & (count > 0)).nonzero(as_tuple=True)
    first = stream * capacity
    merged = _merge_slots(sums, first + slot, first + slots[stream, slot])
    tokens = slots[:, most:].contiguous()
    sums.add_(tokens, keys, values, 1)
    return tokens, merged


def part_slots(sums: Dictionary, deposits: Dictionary, merged: MergedSlots) -> None:
    """Take slots out of those they were merged into, in place; each part gets the gradient of the sum."""
    for total, part in ((sums.key_sum, merged.key_sum), (sums.value_sum, merged.value_sum)):
        rows = total.view(-1, total.shape[-1])
        rows.index_add_(0, merged.target, part, alpha=-1)
        rows[merged.source] = part
    count = sums.count.view(-1)
    count.index_add_(0, merged.target, merged.count, alpha=-1)
    count[merged.source] = merged.count
    for grad in (deposits.key_sum, deposits.value_sum):
        rows = grad.view(-1, grad.shape[-1])
        rows[merged.source] = rows[merged.target]


def _homes(roots: Tensor, is_there: Tensor, num_slots: int) -> Tensor:
    """The slot `[S, M]` of each item: the lowest slot of its cluster, or a free slot if it has none.

    Clusters of tokens alone take the free slots, in the order of their first tokens.
    """
    index = torch.arange(roots.shape[1], device=roots.device)
    is_kept = (roots == index) & is_there
    is_free = ~is_kept
    # Every place beyond the earlier slots is free.
    is_free[:, num_slots:] = True
    free = (~is_free).byte().argsort(dim=-1, stable=True)
    is_new = is_kept & (index >= num_slots)
    place = free.gather(1, (is_new.cumsum(-1) - 1).clamp(min=0))
    return torch.where(is_new, place, index).gather(1, roots)


def _merge_slots(sums: Dictionary, source: Tensor, target: Tensor) -> MergedSlots:
    """Move rows of the flattened sums into others, in order."""
    parts = []
    for total in (sums.key_sum, sums.value_sum, sums.count):
        rows = total.view(-1, total.shape[-1]) if total.dim() == 3 else total.view(-1)
        part = rows[source]
        rows.index_add_(0, target, part)
        rows[source] = 0
        parts.append(part)
    return MergedSlots(source, target, *parts)
