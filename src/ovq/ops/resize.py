"""Shrinking and growing the dictionary of a state: `OVQState.resize`."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.state import OVQState, slot_means


def resized(state: OVQState, num_slots: int) -> OVQState:
    """`state` bounded by `num_slots` from here on; see `OVQState.resize`."""
    if not isinstance(num_slots, int) or isinstance(num_slots, bool) or num_slots < 1:
        raise ValueError(f"num_slots: expected an integer of at least 1, found {num_slots!r}")
    if state.count.shape[2] <= num_slots:
        return dataclasses.replace(state, num_slots=num_slots)
    heads = [
        _shrunk_head(state.key_sum[b, h], state.value_sum[b, h], state.count[b, h], num_slots)
        for b in range(state.batch_size)
        for h in range(state.count.shape[1])
    ]
    shape = (*state.count.shape[:2], num_slots, -1)
    key_sum, value_sum, count = (torch.stack(parts) for parts in zip(*heads, strict=True))
    return dataclasses.replace(
        state,
        key_sum=key_sum.view(shape),
        value_sum=value_sum.view(shape),
        count=count.view(shape[:3]),
        num_slots=num_slots,
    )


def _shrunk_head(
    key_sum: Tensor, value_sum: Tensor, count: Tensor, num_slots: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One head's dictionary with its `num_slots` most used slots kept and the others merged into those."""
    # Stable, so that of equally used slots the older (lower index) is kept; kept slots stay in their order.
    by_use = count.argsort(descending=True, stable=True)
    kept = by_use[:num_slots].sort().values
    dropped = by_use[num_slots:].sort().values
    dropped = dropped[count[dropped] > 0]
    means = torch.nn.functional.normalize(slot_means(key_sum.double(), count), dim=-1)
    # argmax returns the first of equal maxima: ties go to the lowest index, as everywhere.
    target = (means[dropped] @ means[kept].T).argmax(-1)
    return (
        key_sum[kept].index_add(0, target, key_sum[dropped]),
        value_sum[kept].index_add(0, target, value_sum[dropped]),
        count[kept].index_add(0, target, count[dropped]),
    )
