"""The cache of an OVQ model in transformers, and all that depends on the version of transformers.

Version 5.24 renamed `past_key_values` to `cache` nearly everywhere; `CACHE_KEY` is the name the installed one
uses.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers.cache import ConvStateMixin, SlotCache, key_value_kind

#: Name of the cache among the arguments of `forward` that `generate` uses, and in model outputs.
CACHE_KEY = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


class _LayerCache(ConvStateMixin):
    """What all layer caches of an OVQ model share: moving the convolution's state, and no way back."""

    # A convolution's state cannot forget tokens it was given, and a dictionary even less so.
    is_croppable = False
    # Shapes depend on the number of tokens seen.
    is_compileable = False
    supports_early_init = False

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move_to("cpu")

    def prefetch(self) -> None:
        """Move everything back to the device it came from."""
        if self.is_initialized:
            self._move_to(self.device)

    def _move_to(self, device: torch.device | str) -> None:
        self._map_conv(lambda t: t.to(device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens; `crop(0)` does nothing.

        Raises:
            ValueError: `tokens_to_remove` is not 0.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                f"expected crop(0), found crop({tokens_to_remove}): tokens in a state cannot be taken out "
                "again; keep a copy of the cache from before them (copy.deepcopy)"
            )


class _AttentionLayerCache(_LayerCache):
    """Stock keys and values with the state of a convolution beside them."""

    @property
    def kind(self) -> str:
        """What it holds."""
        return key_value_kind(getattr(self, "sliding_window", None))

    def memory_nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    def _move_to(self, device: torch.device | str) -> None:
        super()._move_to(device)
        if self.keys is not None:
            self.keys = self.keys.to(device, non_blocking=True)
            self.values = self.values.to(device, non_blocking=True)

    def reset(self) -> None:
        """Forget everything."""
        # Some versions zero the tensors but keep their length, which `update` would then append to.
        self.keys, self.values, self.is_initialized = None, None, False
        super().reset()


class FullAttentionCacheLayer(_AttentionLayerCache, DynamicLayer):
    """Cache of a `"full_attention"` layer."""


class SlidingWindowCacheLayer(_AttentionLayerCache, DynamicSlidingWindowLayer):
    """Cache of a `"sliding_attention"` layer: the last `sliding_window - 1` tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values; return what the new tokens may look at."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        # The stock layer keeps views, which hold the memory of a whole prompt until the next token.
        self.keys, self.values = self.keys.clone(), self.values.clone()
        return seen


class SlotCacheLayer(_LayerCache, SlotCache, CacheLayerMixin):
    """Cache of an `"ovq"` layer: its `OVQState` and the state of its convolution."""

    is_sliding = False

    def set_state(self, state: Any, num_new: int) -> None:
        """Keep the state after `num_new` more columns."""
        super().set_state(state, num_new)
        self.device = state.count.device
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the state comes from the op."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Not for this layer, which keeps no keys: the mixer sets the state."""
        raise NotImplementedError("an OVQ layer keeps a state, not keys and values: use set_state")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the columns a mask has to cover."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no bound."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.is_initialized = False

    def _move_to(self, device: torch.device | str) -> None:
        super()._move_to(device)
        self._map_state(lambda s: s.to(device, non_blocking=True))


class OVQCache(Cache):
    """Cache of an OVQ model: one layer cache a layer, of the kind its mixer needs.

    Args:
        config: of the model.

    Example:
        >>> from ovq.hf import OVQConfig
        >>> cache = OVQCache(OVQConfig(num_hidden_layers=2))
        >>> [type(layer).__name__ for layer in cache.layers], cache.nbytes
        (['SlidingWindowCacheLayer', 'SlotCacheLayer'], 0)
    """

    def __init__(self, config: OVQConfig):
        super().__init__(layers=[_layer_cache(name, config) for name in config.mixer_types])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept for all layers and rows."""
        return sum(layer.nbytes for layer in self.layers)


def _layer_cache(mixer_type: str, config: OVQConfig) -> _LayerCache:
    if mixer_type == "full_attention":
        return FullAttentionCacheLayer()
    if mixer_type == "sliding_attention":
        return SlidingWindowCacheLayer(sliding_window=config.sliding_window)
    return SlotCacheLayer()


def one_cache(past_key_values: Any, cache: Any) -> OVQCache | None:
    """The cache a caller passed under either of its names.

    Raises:
        ValueError: both names used for different objects, or something else than an `OVQCache`.
    """
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        raise ValueError(
            "expected one of past_key_values and cache, which are the same argument; found two caches"
        )
    found = cache if past_key_values is None else past_key_values
    if found is not None and not isinstance(found, OVQCache):
        raise ValueError(
            f"expected an OVQCache (ovq.hf.OVQCache(config)) as cache, found {type(found).__name__}"
        )
    return found


def add_generation_cache(config: OVQConfig, generation_config: GenerationConfig, model_kwargs: dict) -> bool:
    """Put a fresh `OVQCache` into the arguments of a `generate` call that wants one and brought none.

    Returns:
        Whether it did; if not, transformers' own preparation has no cache to make either.

    Raises:
        ValueError: a `cache_implementation` that cannot hold an OVQ state.
    """
    implementation = generation_config.cache_implementation
    if implementation not in (None, "dynamic"):
        raise ValueError(
            f"expected cache_implementation None or 'dynamic', found {implementation!r}: "
            "an OVQ model has a cache of its own, which is small already"
        )
    given = one_cache(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
    if given is None and generation_config.use_cache is False:
        return False
    model_kwargs[CACHE_KEY] = OVQCache(config) if given is None else given
    return given is None
