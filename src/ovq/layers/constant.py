"""What mixers with a state of constant size have in common: a few named tensors, counted and checked."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from ovq.layers.base import Mixer
from ovq.layers.cache import StateCache

#: Names of the tensors of a state, each with its shape (without the rows) and its dtype.
StateSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]


class ConstantStateMixer(Mixer):
    """A mixer whose memory is a few tensors of one size, whatever the length.

    A subclass says which by `state_spec`, and takes and hands back their values by `state_before` and
    `StateCache.set_state`.
    """

    #: What the cache holds, in words.
    state_kind: str
    supports_rope = False

    @abstractmethod
    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """The tensors kept for one row, by name, for activations in `dtype`."""

    def state_before(self, cache: StateCache | None, num_rows: int, like: Tensor) -> dict[str, Tensor]:
        """The state that a call starts from: that of the cache, or zeros.

        Args:
            cache: this layer's cache, or None.
            num_rows: rows R of the call.
            like: a tensor in the dtype and on the device of the activations.

        Raises:
            ValueError: the cache holds the state of a layer of another size.
        """
        spec = self.state_spec(like.dtype)
        if cache is None or cache.state is None:
            return {
                name: torch.zeros(num_rows, *shape, dtype=dtype, device=like.device)
                for name, (shape, dtype) in spec.items()
            }
        for name, (shape, dtype) in spec.items():
            found = cache.state[name]
            if found.shape != (num_rows, *shape) or found.dtype != dtype:
                raise ValueError(
                    f"expected {name} of shape {[num_rows, *shape]} in {dtype} in {self.state_kind}, "
                    f"found {list(found.shape)} in {found.dtype}"
                )
        return cache.state

    @property
    def cache_kind(self) -> str:
        """What the cache holds, in words."""
        return self.state_kind

    def new_cache(self) -> StateCache:
        """An empty cache for this layer."""
        return StateCache(self.state_kind)

    def memory_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the state of one row: the same after any number of tokens."""
        return sum(math.prod(shape) * kind.itemsize for shape, kind in self.state_spec(dtype).values())


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which products keep the dtype of their factors: autocast would round sums to bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tokens: float64 for float64 activations, float32 for all else."""
    return torch.promote_types(dtype, torch.float32)
