"""`PendingBuffers`: buffers of pending tokens that decode steps write in place, unseen by earlier states."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False)
class PendingBuffers:
    """Copies of pending keys and values, shared by a chain of decode steps that each write the next place.

    A state never reads beyond its own tokens, so a step may write the place after them, unless another step
    from the same state has already done so. Only these copies are ever written to: if a state holds other
    tensors, its caller's or the op's, the first step copies them. Code that makes a state need not know this.

    Attributes:
        keys: `[B, Hkv, C, K]`. values: `[B, Hkv, C, V]`.
        written: places of each row that hold tokens.
        weights: `[B, Hkv, C]` where tokens have weights, else None.
        num_seen: the `num_seen` of the state whose step wrote last; None before the first step.

    Example:
        >>> buffers = PendingBuffers.copied(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), [0])
        >>> own = buffers.keys, buffers.values
        >>> buffers.take(*own, [0]), buffers.take(*own, [1]), buffers.take(*own, [1])
        (True, True, False)
    """

    keys: Tensor
    values: Tensor
    written: list[int]
    weights: Tensor | None = None
    num_seen: Tensor | None = None

    @classmethod
    def copied(
        cls, keys: Tensor, values: Tensor, places: list[int], weights: Tensor | None = None
    ) -> PendingBuffers:
        """Contiguous copies whose first `places[r]` places hold the tokens of row r."""
        dense = {"memory_format": torch.contiguous_format}
        own_weights = None if weights is None else weights.clone(**dense)
        return cls(keys.clone(**dense), values.clone(**dense), list(places), own_weights)

    def are(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> bool:
        """Whether these are the buffers."""
        return keys is self.keys and values is self.values and weights is self.weights

    def take(self, keys: Tensor, values: Tensor, places: list[int], weights: Tensor | None = None) -> bool:
        """Whether these are the buffers and `places[r]` is free in each row; it is then taken."""
        if not self.are(keys, values, weights) or places != self.written:
            return False
        if keys.is_inference() and not torch.is_inference_mode_enabled():
            return False  # PyTorch does not allow writing to it.
        self.written = [p + 1 for p in places]
        return True
