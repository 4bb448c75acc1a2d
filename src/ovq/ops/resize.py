"""`OVQState.resize`: the same memory with another bound on its slots."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ovq.ops.nearest import Items, nearest_roots
from ovq.ops.options import COUNT_POWERS, check_sizes, check_value_weight
from ovq.ops.state import OVQState
from ovq.ops.ward import cluster_roots, pair_points

# By which power of counts pairs of slots are merged, under each rule that is known here.
_POWERS = {"existing": 1.0, "updated": 1.0} | {name: COUNT_POWERS[name] for name in ("ward", "ward-sqrt")}


def resized(state: OVQState, num_slots: int, *, merge: str, value_weight: float) -> OVQState:
    """`state` with at most `num_slots` slots per head from here on; see `OVQState.resize`."""
    check_sizes(1, num_slots=num_slots)
    if merge not in (known := (*_POWERS, "nearest")):
        raise ValueError(f"merge: expected one of {known}, found {merge!r}")
    check_value_weight("value_weight", value_weight)
    if state.count.shape[2] <= num_slots:
        return dataclasses.replace(state, num_slots=num_slots)
    rows, heads = state.count.shape[:2]
    count, mass = state.count.flatten(0, 1), state.mass.flatten(0, 1)
    due = [max(0, n - num_slots) for n in state.num_open.tolist() for _ in range(heads)]
    weight = None if state.weight is None else mass.detach()
    with torch.no_grad():
        keys, values = state.keys.flatten(0, 1), state.values.flatten(0, 1)
        if merge == "nearest":
            roots = nearest_roots(
                Items.of(keys, values, mass, count, value_weight=value_weight), count > 0, due
            )
        else:
            points = pair_points(keys, values, mass, value_weight)
            roots = cluster_roots(points, count, due, count_power=_POWERS[merge], weight=weight)
    is_kept = (roots == torch.arange(count.shape[1], device=count.device)) & (count > 0)
    # Spare slots hold zeros, so they can be added to the last slot that is kept.
    place = (is_kept.cumsum(-1) - 1).clamp(min=0).gather(1, roots)

    def merged(sums: Tensor) -> Tensor:
        parts = sums.flatten(0, 1)
        index = place.view(*place.shape, *[1] * (parts.dim() - 2)).expand_as(parts)
        total = parts.new_zeros(len(parts), num_slots, *parts.shape[2:])
        return total.scatter_add(1, index, parts).unflatten(0, (rows, heads))

    changed: dict[str, Any] = {"num_slots": num_slots}
    for name in ("key_sum", "value_sum", "count", *(() if state.weight is None else ("weight",))):
        changed[name] = merged(getattr(state, name))
    return dataclasses.replace(state, **changed)
