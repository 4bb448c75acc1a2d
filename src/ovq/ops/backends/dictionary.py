"""`Dictionary`: the sums, counts and weights of slots, which backends update in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ovq.ops.state import OVQState
from ovq.ops.sums import without_trace


def dense_copy(x: Tensor) -> Tensor:
    """Contiguous copy, so that a flattened view can be updated in place."""
    return x.clone(memory_format=torch.contiguous_format)


@dataclasses.dataclass
class Dictionary:
    """Sums `[..., M, K]`, `[..., M, V]` and counts `[..., M]` of slots, or gradients of the sums and counts.

    With token weights, also the total weight `[..., M]` of each slot.
    """

    key_sum: Tensor
    value_sum: Tensor
    count: Tensor
    weight: Tensor | None = None

    @classmethod
    def of(cls, state: OVQState) -> Dictionary:
        """The dictionaries of a state, without copying."""
        return cls(state.key_sum, state.value_sum, state.count, state.weight)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The fields in order."""
        return self.key_sum, self.value_sum, self.count, self.weight

    @property
    def mass(self) -> Tensor:
        """Mass of each slot: its total weight, or its count without token weights."""
        return self.count if self.weight is None else self.weight

    def map(self, function: Callable[[Tensor], Tensor]) -> Dictionary:
        """The dictionary with a function applied to each tensor."""
        weight = None if self.weight is None else function(self.weight)
        return Dictionary(function(self.key_sum), function(self.value_sum), function(self.count), weight)

    def clone(self) -> Dictionary:
        """A copy that can be updated in place, contiguous even if this one is not."""
        return self.map(dense_copy)

    def gradients(self, given: Sequence[Tensor | None]) -> Dictionary:
        """Gradients of these tensors from autograd (None for zeros), as copies to update in place."""

        def own(x: Tensor, grad: Tensor | None) -> Tensor:
            return torch.zeros_like(x) if grad is None else dense_copy(grad)

        key_sum, value_sum, _, weight = given
        of_weight = None if self.weight is None else own(self.weight, weight)
        return Dictionary(own(self.key_sum, key_sum), own(self.value_sum, value_sum), self.count, of_weight)

    def index(self, slots: Tensor) -> Tensor:
        """Row indices into the flattened sums for slots `[S, C]` of the first S streams."""
        first = torch.arange(len(slots), device=slots.device) * self.key_sum.shape[1]
        return (slots + first[:, None]).flatten()

    def add_(
        self, slots: Tensor, keys: Tensor, values: Tensor, sign: int, weights: Tensor | None = None
    ) -> None:
        """Add (sign 1) or subtract (sign -1) tokens `[S, C, D]`, in order of position.

        Keys and values are multiplied by the weights `[S, C]`, if given.
        """
        index = self.index(slots)
        for sums, x in ((self.key_sum, keys), (self.value_sum, values)):
            flat = sums.view(-1, sums.shape[-1])
            x = x if weights is None else weights[..., None] * without_trace(x, weights)
            flat.index_add_(0, index, x.reshape(-1, x.shape[-1]), alpha=sign)
        self.count.view(-1).index_add_(0, index, torch.ones_like(index), alpha=sign)
        if weights is not None:
            assert self.weight is not None
            self.weight.view(-1).index_add_(0, index, weights.flatten(), alpha=sign)
