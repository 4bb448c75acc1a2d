"""`Sums`: a dictionary as the backends work on it, in place."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.groups import Group


def dense_copy(x: Tensor) -> Tensor:
    """A contiguous copy: what is worked on in place, row by row of a flat view."""
    return x.clone(memory_format=torch.contiguous_format)


@dataclasses.dataclass
class Sums:
    """Dictionary sums `[..., M, K]`, `[..., M, V]` and counts `[..., M]`, or the gradient of the sums."""

    key: Tensor
    value: Tensor
    count: Tensor | None = None

    def of(self, group: Group) -> Sums:
        """The group's streams `[S, M, ...]`, as views."""
        count = None if self.count is None else group.streams(self.count)
        return Sums(group.streams(self.key), group.streams(self.value), count)

    def clone(self) -> Sums:
        """A copy that can be worked on in place, contiguous whatever this is."""
        return Sums(*(None if x is None else dense_copy(x) for x in (self.key, self.value, self.count)))

    def index(self, slots: Tensor) -> Tensor:
        """Rows of the flattened sums that `slots` `[S, C]` of the first S streams stand for."""
        first = torch.arange(len(slots), device=slots.device) * self.key.shape[1]
        return (slots + first[:, None]).flatten()

    def add_(self, slots: Tensor, keys: Tensor, values: Tensor, sign: int) -> None:
        """Add (sign 1) or take back (sign -1) tokens `[S, C, D]` in order of position."""
        index = self.index(slots)
        flat_key = self.key.view(-1, self.key.shape[-1])
        flat_value = self.value.view(-1, self.value.shape[-1])
        flat_key.index_add_(0, index, keys.reshape(-1, keys.shape[-1]), alpha=sign)
        flat_value.index_add_(0, index, values.reshape(-1, values.shape[-1]), alpha=sign)
        self.count.view(-1).index_add_(0, index, torch.ones_like(index), alpha=sign)
