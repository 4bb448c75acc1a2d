"""`PendingBuffers`: pending tokens that decode steps write in place without changing earlier states."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False)
class PendingBuffers:
    """Copies of pending keys and values, shared by a chain of decode steps that each write the next position.

    A state never reads beyond its own tokens, so a step may write to the next position, unless another step
    from the same state has already done so. Only these copies are ever written to: if a state holds other
    tensors, from the caller or the op, the first step copies them. Code that makes states can ignore this.

    Attributes:
        keys: `[B, Hkv, C, K]`. values: `[B, Hkv, C, V]`.
        written: number of tokens written in each row.
        weights: `[B, Hkv, C]`; None without token weights.
        num_seen: `num_seen` of the state that the last step made; None before the first step.
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
        """Contiguous copies, with the tokens of row r in the first `places[r]` positions."""
        dense = {"memory_format": torch.contiguous_format}
        own_weights = None if weights is None else weights.clone(**dense)
        return cls(keys.clone(**dense), values.clone(**dense), list(places), own_weights)

    def are(self, keys: Tensor, values: Tensor, weights: Tensor | None = None) -> bool:
        """Whether these tensors are the buffers themselves."""
        return keys is self.keys and values is self.values and weights is self.weights

    def take(self, keys: Tensor, values: Tensor, places: list[int], weights: Tensor | None = None) -> bool:
        """Reserve position `places[r]` of each row; False if it is taken or these are other tensors."""
        if not self.are(keys, values, weights) or places != self.written:
            return False
        if keys.is_inference() and not torch.is_inference_mode_enabled():
            return False  # PyTorch forbids writing to inference tensors.
        self.written = [p + 1 for p in places]
        return True
