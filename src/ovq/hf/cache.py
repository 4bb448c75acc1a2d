"""The cache of an OVQ model in transformers, and all that depends on the version of transformers.

Version 5.24 renamed `past_key_values` to `cache` nearly everywhere; `CACHE_KEY` is the name the installed one
uses.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers import ConstantStateMixer, SlotCache, StateCache, mixer_class
from ovq.layers.cache import ConvStateMixin, key_value_kind
from ovq.layers.common import apply_rotary, rotary_tables
from ovq.ops import OVQState
from ovq.ops.serialization import STATE_TENSORS, state_tensors

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
    #: Base of the rotary frequencies of the keys; None for keys without rotary embedding.
    rope_theta: float | None = None

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._move_to("cpu")

    def prefetch(self) -> None:
        """Move everything back to the device it came from."""
        if self.is_initialized:
            self._move_to(self.device)

    def _move_to(self, device: torch.device | str) -> None:
        self._map_conv(lambda t: t.to(device, non_blocking=True))

    def detach_(self) -> None:
        """Cut what is held out of the graph that made it."""
        self._map_conv(Tensor.detach)

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

    def tensors(self) -> dict[str, Tensor]:
        """What there is to save, by name, on the CPU."""
        return {} if self.conv_state is None else {"conv_state": self.conv_state.cpu().contiguous()}

    def restore(self, tensors: dict[str, Tensor], num_columns: int, config: OVQConfig) -> None:
        """Fill this layer, which is empty, with what `tensors` gave for a layer of `num_columns` columns."""
        self.conv_state = tensors.get("conv_state")

    def join(self, parts: Sequence[_LayerCache], num_columns: int) -> None:
        """Fill this layer, which is empty, with the rows of others, padded left to `num_columns` columns."""
        if parts[0].conv_state is not None:
            self.conv_state = torch.cat([part.conv_state for part in parts])
        self.has_padding = any(part.has_padding or part.get_seq_length() < num_columns for part in parts)

    def _moved(self, keys: Tensor, num_columns: int) -> Tensor:
        """Keys `[..., K]`, or sums of them, as they would be had the row begun `num_columns` later."""
        if self.rope_theta is None or num_columns == 0:
            return keys
        # A rotation by position p and one by m more is that by p + m, and a rotation of a sum that of its
        # parts.
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cos, sin = rotary_tables(num_columns, 1, keys.shape[-1], theta=self.rope_theta, like=wide)
        return apply_rotary(wide, cos, sin).to(keys.dtype)


class _AttentionLayerCache(_LayerCache):
    """Stock keys and values with the state of a convolution beside them."""

    @property
    def kind(self) -> str:
        """What it holds."""
        return key_value_kind(getattr(self, "sliding_window", None))

    @property
    def num_rows(self) -> int:
        """Rows B."""
        return self.keys.shape[0]

    def memory_nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes

    def _move_to(self, device: torch.device | str) -> None:
        super()._move_to(device)
        if self.keys is not None:
            self.keys = self.keys.to(device, non_blocking=True)
            self.values = self.values.to(device, non_blocking=True)

    def detach_(self) -> None:
        """Cut what is held out of the graph that made it."""
        super().detach_()
        if self.keys is not None:
            self.keys, self.values = self.keys.detach(), self.values.detach()

    def reset(self) -> None:
        """Forget everything."""
        # Some versions zero the tensors but keep their length, which `update` would then append to.
        self.keys, self.values, self.is_initialized = None, None, False
        super().reset()

    def tensors(self) -> dict[str, Tensor]:
        """Keys, values and the state of the convolution."""
        kept = {"keys": self.keys, "values": self.values}
        return super().tensors() | {name: t.cpu().contiguous() for name, t in kept.items()}

    def restore(self, tensors: dict[str, Tensor], num_columns: int, config: OVQConfig) -> None:
        """Fill this layer, which is empty."""
        super().restore(tensors, num_columns, config)
        self.update(tensors["keys"], tensors["values"])

    def join(self, parts: Sequence[_AttentionLayerCache], num_columns: int) -> None:
        """Fill this layer, which is empty, with the rows of others, padded left to `num_columns` columns."""
        super().join(parts, num_columns)
        num_kept = max(part.keys.shape[2] for part in parts)
        keys, values = (
            torch.cat([F.pad(t, (0, 0, num_kept - t.shape[2], 0)) for t in tensors])
            for tensors in (
                [part._moved(part.keys, num_columns - part.get_seq_length()) for part in parts],
                [part.values for part in parts],
            )
        )
        self.update(keys, values)


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

    def restore(self, tensors: dict[str, Tensor], num_columns: int, config: OVQConfig) -> None:
        """Fill this layer, which is empty."""
        super().restore(tensors, num_columns, config)
        # The columns that have left the window count, too.
        self.cumulative_length = num_columns

    def join(self, parts: Sequence[_AttentionLayerCache], num_columns: int) -> None:
        """Fill this layer, which is empty, with the rows of others, padded left to `num_columns` columns."""
        super().join(parts, num_columns)
        self.cumulative_length = num_columns


class _StateLayer(_LayerCache):
    """What caches that hold a state have in common, whatever it is: the mixer sets it, and nothing is kept
    that a mask could be about."""

    is_sliding = False

    def set_state(self, state: Any, num_new: int) -> None:
        """Keep the state after `num_new` more columns."""
        super().set_state(state, num_new)
        self.device = self._any_tensor().device
        self.is_initialized = True

    @property
    def num_rows(self) -> int:
        """Rows B."""
        return self._any_tensor().shape[0]

    def _any_tensor(self) -> Tensor:
        """One of the tensors on the model's device."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the state comes from the mixer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Not for this layer, which keeps no keys: the mixer sets the state."""
        raise NotImplementedError("this layer keeps a state, not keys and values: use set_state")

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

    def detach_(self) -> None:
        """Cut what is held out of the graph that made it."""
        super().detach_()
        self._map_state(lambda s: s.detach())


class SlotCacheLayer(_StateLayer, SlotCache, CacheLayerMixin):
    """Cache of an `"ovq"` layer: its `OVQState` and the state of its convolution."""

    def _any_tensor(self) -> Tensor:
        return self.state.count

    def tensors(self) -> dict[str, Tensor]:
        """Those of the state, and the state of the convolution."""
        return super().tensors() | state_tensors(self.state)

    def restore(self, tensors: dict[str, Tensor], num_columns: int, config: OVQConfig) -> None:
        """Fill this layer, which is empty."""
        super().restore(tensors, num_columns, config)
        parts = {name: tensors[name] for name in STATE_TENSORS}
        state = OVQState(**parts, num_slots=config.num_slots, chunk_size=config.chunk_size)
        self.set_state(state, num_columns)

    def join(self, parts: Sequence[SlotCacheLayer], num_columns: int) -> None:
        """Fill this layer, which is empty, with the rows of others."""
        super().join(parts, num_columns)
        states = []
        for part in parts:
            num_missing = num_columns - part.get_seq_length()
            keys = {
                name: self._moved(getattr(part.state, name), num_missing)
                for name in ("key_sum", "pending_keys")
            }
            states.append(dataclasses.replace(part.state, **keys))
        self.set_state(OVQState.concatenate(states), num_columns)


class StateCacheLayer(_StateLayer, StateCache, CacheLayerMixin):
    """Cache of a layer with a state of constant size: its tensors and the state of its convolution."""

    def _any_tensor(self) -> Tensor:
        return next(iter(self.state.values()))

    def tensors(self) -> dict[str, Tensor]:
        """Those of the state, and the state of the convolution."""
        return super().tensors() | {name: t.cpu().contiguous() for name, t in self.state.items()}

    def restore(self, tensors: dict[str, Tensor], num_columns: int, config: OVQConfig) -> None:
        """Fill this layer, which is empty."""
        super().restore(tensors, num_columns, config)
        self.set_state({name: t for name, t in tensors.items() if name != "conv_state"}, num_columns)

    def join(self, parts: Sequence[StateCacheLayer], num_columns: int) -> None:
        """Fill this layer, which is empty, with the rows of others: no state here knows of columns."""
        super().join(parts, num_columns)
        names = parts[0].state
        self.set_state({name: torch.cat([part.state[name] for part in parts]) for name in names}, num_columns)


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

    @property
    def num_rows(self) -> int:
        """Rows B; 0 before the first token."""
        return self.layers[0].num_rows if self.get_seq_length() else 0

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


def _layer_cache(mixer_type: str, config: OVQConfig) -> _LayerCache:
    mixer = mixer_class(mixer_type)
    if mixer_type == "ovq":
        layer = SlotCacheLayer()
    elif issubclass(mixer, ConstantStateMixer):
        layer = StateCacheLayer(mixer.state_kind)
    elif mixer_type == "full_attention":
        layer = FullAttentionCacheLayer()
    else:
        layer = SlidingWindowCacheLayer(sliding_window=config.sliding_window)
    layer.rope_theta = config.rope_theta if mixer_type in config.rope_mixers else None
    return layer


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
