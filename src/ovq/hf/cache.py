"""The cache of an OVQ model in transformers, and all that depends on the version of transformers.

Version 5.24 renamed `past_key_values` to `cache` nearly everywhere; `CACHE_KEY` is the name the installed one
uses.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.cache_utils import CacheLayerMixin

from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers import LayerCache, mixer_class

#: Name of the cache among the arguments of `forward` that `generate` uses, and in model outputs.
CACHE_KEY = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


class OVQCacheLayer(LayerCache, CacheLayerMixin):
    """The cache of one layer of an OVQ model, whatever its mixer keeps.

    Args:
        memory: of the mixer; it handles the state.
    """

    # A convolution's state cannot forget tokens it was given, and a dictionary even less so.
    is_croppable = False
    # Shapes depend on the number of tokens seen.
    is_compileable = False
    supports_early_init = False
    is_sliding = False
    #: Where the state is when it is in use.
    device: torch.device | None = None

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]  # an attribute in transformers
        """Whether there is a state."""
        return self.state is not None

    # transformers' names for what a layer of attention keeps.
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]  # likewise
        """`[B, Hkv, S, K]`, where keys are kept."""
        return self.parts().get("keys")

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]  # likewise
        """`[B, Hkv, S, V]`, where values are kept."""
        return self.parts().get("values")

    def set_state(self, state: Any, num_new: int) -> None:
        """Keep the state after `num_new` more columns."""
        super().set_state(state, num_new)
        self.device = next(iter(self.memory.tensors(state).values())).device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the state comes from the mixer."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Not for this layer: the mixer sets the state."""
        raise NotImplementedError("this layer keeps a state that its mixer makes: use set_state")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the columns a mask has to cover: all."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no bound."""
        return -1

    def offload(self) -> None:
        """Move everything to the CPU."""
        self.move_to("cpu")

    def prefetch(self) -> None:
        """Move everything back to the device it came from."""
        if self.device is not None:
            self.move_to(self.device)

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens; `crop(0)` does nothing.

        Raises:
            ValueError: `tokens_to_remove` is not 0.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                f"expected crop(0), found crop({tokens_to_remove}): tokens in a state cannot be taken out "
                "again; keep a snapshot of the cache from before them (OVQCache.snapshot)"
            )


class OVQCache(Cache):
    """Cache of an OVQ model: for each layer what its mixer keeps.

    Args:
        config: of the model.

    Example:
        >>> from ovq.hf import OVQConfig
        >>> cache = OVQCache(OVQConfig(num_hidden_layers=2))
        >>> [layer.memory.kind for layer in cache.layers], cache.nbytes
        (['the keys and values of a window of 128', 'an OVQState'], 0)
    """

    layers: list[OVQCacheLayer]  # type: ignore[assignment]  # transformers' may be of other kinds

    def __init__(self, config: OVQConfig):
        rope_thetas = dict.fromkeys(config.rope_mixers, config.rope_theta)
        super().__init__(
            layers=[
                OVQCacheLayer(mixer_class(name).memory_of(config, rope_theta=rope_thetas.get(name)))
                for name in config.mixer_types
            ]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept for all layers and rows."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def num_rows(self) -> int:
        """Rows B; 0 before the first token."""
        return self.layers[0].num_rows

    def snapshot(self) -> OVQCache:
        """A cache of its own that starts where this one is: a branch, or the way back from rejected tokens.

        It costs next to nothing: the two share tensors, and no tensor is changed that another cache can see.

        Example:
            >>> from ovq.hf import OVQConfig, OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model, cache = OVQModel(config).eval(), OVQCache(config)
            >>> _ = model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
            >>> before = cache.snapshot()
            >>> _ = model(torch.tensor([[4]]), past_key_values=cache)
            >>> cache.get_seq_length(), before.get_seq_length()
            (4, 3)
        """
        branch = copy.copy(self)
        branch.layers = [copy.copy(layer) for layer in self.layers]
        return branch

    def detach_(self) -> None:
        """Cut what is held out of the graph that made it: no gradient flows to the tokens read so far."""
        for layer in self.layers:
            layer.detach_()

    @staticmethod
    def concatenate(caches: Sequence[OVQCache], config: OVQConfig) -> OVQCache:
        """The rows of several caches in one: how a row joins a running batch. The caches stay as they are.

        Rows with fewer columns than the longest get columns of padding on their left: later calls need an
        `attention_mask` of all columns with zeros there.

        Args:
            caches: of models with this config; each has read at least one column.
            config: of the model.

        Raises:
            ValueError: no caches, an empty one among them, or states of different sizes.

        Example:
            >>> from ovq.hf import OVQConfig, OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model, long, short = OVQModel(config).eval(), OVQCache(config), OVQCache(config)
            >>> _ = model(torch.tensor([[1, 2, 3]]), past_key_values=long)
            >>> _ = model(torch.tensor([[4]]), past_key_values=short)
            >>> both = OVQCache.concatenate([long, short], config)
            >>> mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
            >>> _ = model(torch.tensor([[5], [6]]), mask, past_key_values=both)
        """
        lengths = [cache.get_seq_length() for cache in caches]
        if not lengths or min(lengths) == 0:
            raise ValueError(f"expected caches that have read at least one column, found lengths {lengths}")
        joined = OVQCache(config)
        for layer, parts in zip(
            joined.layers, zip(*(cache.layers for cache in caches), strict=True), strict=True
        ):
            layer.join(parts, max(lengths))
        return joined


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


def add_generation_cache(
    config: OVQConfig, generation_config: GenerationConfig, model_kwargs: dict, batch_size: int
) -> bool:
    """Put a fresh `OVQCache` into the arguments of a `generate` call that wants one and brought none.

    One that was brought gets a row for each beam, if it has a row for each prompt.

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
    if given is not None and given.num_rows == batch_size:
        # transformers repeats inputs for beams and for several returned sequences, but not a cache.
        repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        if repeats > 1:
            given.batch_repeat_interleave(repeats)
    return given is None


def unread_inputs(input_ids: Tensor, model_kwargs: dict) -> Tensor:
    """The columns of `input_ids` that the cache in the arguments of a `generate` call has not read.

    The caller may pass a cache and the mask of all columns, but only the last columns of text. transformers
    then takes all of these to be new, though the cache may have read the first of them.
    """
    cache, mask = model_kwargs.get(CACHE_KEY), model_kwargs.get("attention_mask")
    if cache is None or mask is None:
        return input_ids
    num_unread = mask.shape[1] - cache.get_seq_length()
    return input_ids[:, -num_unread:] if 0 < num_unread < input_ids.shape[1] else input_ids
