"""`PendingBuffers`: pending tokens that decode steps write in place without changing earlier states."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False)
class PendingBuffers:
    """Copies of pending keys and values, shared by a chain of decode steps that each write the next position.

    A state never reads beyond its own tokens, so a step may write to the next position, unless another step
    from the same state has already done so. Only these copies are ever written to: if a state holds other
    tensors, from the caller or the op, the first step copies them. Code that makes states can ignore this.

    Attributes:
        tensors: keys `[B, Hkv, C, K]`, values `[B, Hkv, C, V]`, and weights `[B, Hkv, C]` or None.
        written: number of tokens written in each row.
    """

    tensors: tuple[Tensor | None, ...]
    written: list[int]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copy in another process may have the same tensors, in shared memory: it writes to its own.
        return type(None), ()

    @classmethod
    def copied(cls, tensors: tuple[Tensor | None, ...], places: list[int]) -> PendingBuffers:
        """Contiguous copies, with the tokens of row r in the first `places[r]` positions."""
        dense = {"memory_format": torch.contiguous_format}
        return cls(tuple(None if x is None else x.clone(**dense) for x in tensors), places)

    def are(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether these tensors are the buffers themselves."""
        return all(map(operator.is_, tensors, self.tensors))

    def take(self, tensors: tuple[Tensor | None, ...], places: list[int]) -> bool:
        """Reserve position `places[r]` of each row; False if it is taken or these are other tensors."""
        if not self.are(tensors) or places != self.written:
            return False
        keys = tensors[0]
        if keys is not None and keys.is_inference() and not torch.is_inference_mode_enabled():
            return False  # PyTorch forbids writing to inference tensors.
        self.written = [p + 1 for p in places]
        return True
