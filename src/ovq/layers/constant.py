"""Base class of mixers whose state is a few named tensors of constant size."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from ovq.layers.base import Mixer
from ovq.layers.cache import LayerCache
from ovq.layers.memory import StateSpec, TensorMemory


class ConstantStateMixer(Mixer):
    """A mixer whose state is a few tensors of constant size, whatever the length.

    A subclass declares them in `constant_spec`, gets their values from `state_before` and stores them with
    `LayerCache.set_state`.
    """

    #: Description of the state, for error messages.
    state_kind: str
    supports_rope = False
    runs_in_groups = True

    @abstractmethod
    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """Specification of the tensors for one row, for activations in `dtype`."""

    def memory_spec(self, num_tokens: int, dtype: torch.dtype) -> StateSpec:
        """See `Mixer.memory_spec`."""
        return self.constant_spec(dtype)

    @classmethod
    def memory_of(cls, settings: Any, *, rope_theta: float | None = None) -> TensorMemory:
        """See `Mixer.memory_of`."""
        return TensorMemory(kind=cls.state_kind, rope_theta=rope_theta)

    def state_before(self, cache: LayerCache | None, num_rows: int, like: Tensor) -> dict[str, Tensor]:
        """The initial state of a call of `num_rows` rows with activations like `like`: the cached, or zeros.

        Raises:
            ValueError: if the cache holds the state of a layer of another size.
        """
        spec = self.constant_spec(like.dtype)
        if cache is None or cache.state is None:
            # Expanded, as windows of many short rows would take more than their tokens.
            return {
                name: torch.zeros((), dtype=dtype, device=like.device).expand(num_rows, *shape)
                for name, (shape, dtype) in spec.items()
            }
        for name, (shape, dtype) in spec.items():
            found = cache.state[name]
            if found.shape != (num_rows, *shape) or found.dtype != dtype:
                raise ValueError(
                    f"expected {name} of shape {[num_rows, *shape]} in {dtype} in {self.state_kind}, "
                    f"found {list(found.shape)} in {found.dtype}"
                )
        return for_autograd(cache.state)


def for_autograd(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state`; with gradients a copy, as autograd cannot save tensors that were made in inference mode."""
    return {name: t.clone() for name, t in state.items()} if torch.is_grad_enabled() else state


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over tokens: float64 for float64 activations, else float32."""
    return torch.promote_types(dtype, torch.float32)
