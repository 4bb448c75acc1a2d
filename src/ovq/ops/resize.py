"""`OVQState.resize`: the same memory with another bound on its slots."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ovq.ops.nearest import Items, nearest_roots
from ovq.ops.options import check_sizes, check_value_weight
from ovq.ops.state import OVQState

# One in so many slots is merged before all look for their nearest again. Where all that is due is merged at
# once, slots that have become means of many attract still more (docs/results/memory.md).
_PART = 8


def resized(state: OVQState, num_slots: int, *, value_weight: float) -> OVQState:
    """`state` with at most `num_slots` slots per head from here on; see `OVQState.resize`."""
    check_sizes(1, num_slots=num_slots)
    check_value_weight("value_weight", value_weight)
    while state.count.shape[2] > num_slots:
        due = [min(max(0, n - num_slots), max(1, n // _PART)) for n in state.num_open.tolist()]
        state = _merged(state, due, num_slots, value_weight)
    return dataclasses.replace(state, num_slots=num_slots)


def _merged(state: OVQState, due: list[int], num_slots: int, value_weight: float) -> OVQState:
    """`state` after `due[r]` merges in each head of row r, with room for `num_slots` or what is left."""
    rows, heads = state.count.shape[:2]
    left = [n - merges for n, merges in zip(state.num_open.tolist(), due, strict=True)]
    capacity = max([num_slots, *left])
    count, mass = state.count.flatten(0, 1), state.mass.flatten(0, 1)
    with torch.no_grad():
        keys, values = state.keys.flatten(0, 1), state.values.flatten(0, 1)
        items = Items.of(keys, values, mass, count, value_weight=value_weight)
        roots = nearest_roots(items, count > 0, [merges for merges in due for _ in range(heads)])
    is_kept = (roots == torch.arange(count.shape[1], device=count.device)) & (count > 0)
    # Spare slots hold zeros, so they can be added to the last slot that is kept.
    place = (is_kept.cumsum(-1) - 1).clamp(min=0).gather(1, roots)

    def merged(sums: Tensor) -> Tensor:
        parts = sums.flatten(0, 1)
        index = place.view(*place.shape, *[1] * (parts.dim() - 2)).expand_as(parts)
        total = parts.new_zeros(len(parts), capacity, *parts.shape[2:])
        return total.scatter_add(1, index, parts).unflatten(0, (rows, heads))

    changed: dict[str, Any] = {}
    for name in ("key_sum", "value_sum", "count", *(() if state.weight is None else ("weight",))):
        changed[name] = merged(getattr(state, name))
    return dataclasses.replace(state, **changed)
