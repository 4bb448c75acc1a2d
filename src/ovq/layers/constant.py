"""What mixers with a state of constant size have in common: a few named tensors, counted and checked."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ovq.layers.base import Mixer
from ovq.layers.cache import LayerCache
from ovq.layers.memory import StateSpec, TensorMemory


class ConstantStateMixer(Mixer):
    """A mixer whose memory is a few tensors of one size, whatever the length.

    A subclass says which by `constant_spec`, and takes and hands back their values by `state_before` and
    `LayerCache.set_state`.
    """

    #: What the state is, in words.
    state_kind: str
    supports_rope = False

    @abstractmethod
    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """The tensors kept of one row for activations in `dtype`, however many tokens there were."""

    def memory_spec(self, num_tokens: int, dtype: torch.dtype) -> StateSpec:
        """See `Mixer.memory_spec`."""
        return self.constant_spec(dtype)

    @classmethod
    def memory_of(cls, settings: Any, *, rope_theta: float | None = None) -> TensorMemory:
        """See `Mixer.memory_of`."""
        return TensorMemory(kind=cls.state_kind, rope_theta=rope_theta)

    def state_before(self, cache: LayerCache | None, num_rows: int, like: Tensor) -> dict[str, Tensor]:
        """The state that a call starts from: that of the cache, or zeros.

        Args:
            cache: this layer's cache, or None.
            num_rows: rows R of the call.
            like: a tensor in the dtype and on the device of the activations.

        Raises:
            ValueError: the cache holds the state of a layer of another size.
        """
        spec = self.constant_spec(like.dtype)
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


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which products keep the dtype of their factors: autocast would round sums to bfloat16."""
    return torch.autocast(x.device.type, enabled=False)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over tokens: float64 for float64 activations, float32 for all else."""
    return torch.promote_types(dtype, torch.float32)
