"""Fewer slots that hold the same tokens, for `OVQState.resize`."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.nearest import Items, nearest_roots
from ovq.ops.options import check_sizes, check_value_weight
from ovq.ops.sums import added_up, slot_means

# One in so many slots is merged before all look for their nearest again. Where all that is due is merged at
# once, slots that have become means of many attract still more (docs/results/memory.md).
_PART = 8


def shrunk(slots: dict[str, Tensor], num_slots: int, *, value_weight: float) -> dict[str, Tensor]:
    """The slots of a state (by name), merged until there are at most `num_slots` per head."""
    check_sizes(1, num_slots=num_slots)
    check_value_weight("value_weight", value_weight)
    while slots["count"].shape[2] > num_slots:
        num_open = (slots["count"][:, 0] > 0).sum(-1).tolist()
        due = [min(max(0, n - num_slots), max(1, n // _PART)) for n in num_open]
        # Room for as many slots as are wanted, or for those that are left.
        capacity = max([num_slots, *(n - merges for n, merges in zip(num_open, due, strict=True))])
        slots = _merged(slots, due, capacity, value_weight)
    return slots


def _merged(
    slots: dict[str, Tensor], due: list[int], capacity: int, value_weight: float
) -> dict[str, Tensor]:
    """`slots` after `due[r]` merges in each head of row r, with room for `capacity`."""
    rows, heads = slots["count"].shape[:2]
    streams = {name: x.flatten(0, 1) for name, x in slots.items()}
    count = streams["count"]
    with torch.no_grad():
        mass = streams.get("weight", count)
        keys, values = (slot_means(streams[name], mass) for name in ("key_sum", "value_sum"))
        items = Items.of(keys, values, mass, count, value_weight=value_weight)
        roots = nearest_roots(items, count > 0, [merges for merges in due for _ in range(heads)])
    is_kept = (roots == torch.arange(count.shape[1], device=count.device)) & (count > 0)
    # Spare slots hold zeros, so they can be added to the last slot that is kept.
    place = (is_kept.cumsum(-1) - 1).clamp(min=0).gather(1, roots)
    totals = {name: added_up(parts, place, capacity) for name, parts in streams.items()}
    return {name: total.unflatten(0, (rows, heads)) for name, total in totals.items()}
