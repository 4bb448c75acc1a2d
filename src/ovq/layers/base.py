"""The base class of all mixers: the calling contract, projections and convolution."""

from __future__ import annotations

import functools
import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ovq.fields import ConfigField, did_you_mean
from ovq.layers import defaults
from ovq.layers.cache import LayerCache, MixerCache
from ovq.layers.common import ShortConvolution, check_kwargs
from ovq.layers.gates import OutputGate
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import Memory, check_num_seen, num_bytes
from ovq.layers.products import Linear
from ovq.layers.sizes import check_conv_size
from ovq.ops.options import check_sizes
from ovq.ops.parts import StateSpec, check_tensors, of_rows

# Models hand what they are called with to their layers, and layers have no use for these.
_OF_MODELS = frozenset({"cache_position", "num_items_in_batch", "output_hidden_states", "return_dict"})


class Mixer(nn.Module, ABC):
    """A causal sequence mixer with the forward contract of flash-linear-attention's layers.

    It projects the tokens to channels, convolves those, mixes them over time, and projects back.

    Args:
        hidden_size: width of the model.
        num_channels: number of channels that are convolved and mixed.
        num_outputs: width of the result of `mix`.
        conv_size: kernel size of the causal depthwise convolution on the channels; 0 for none.
        layer_idx: index of the layer in the cache; layers that share a cache need one each. None means 0.
        use_rope: whether to apply rotary embedding to queries and keys; refused by mixers without it.

    Raises:
        TypeError: if the mixer has no such argument.
        ValueError: if a value is out of range.
    """

    #: Keyword arguments that `forward` accepts besides `cu_seqlens`.
    forward_options: frozenset[str] = frozenset()
    #: Constructor arguments that a model takes from its config, each with the name of a field of every config
    #: or with a field that configs have for this mixer.
    config_fields: ClassVar[dict[str, str | ConfigField]] = {
        name: name for name in ("hidden_size", "conv_size")
    }
    #: Whether the mixer supports rotary embedding.
    supports_rope: bool = True
    #: Whether packed rows of very different lengths are mixed in several calls (`SequenceLayout.in_groups`).
    runs_in_groups: ClassVar[bool] = False
    #: Reason, for an error message, why a training step must process all its tokens in one call; None if not.
    trained_on_whole_batches: ClassVar[str | None] = None

    def __init__(
        self,
        hidden_size: int,
        *,
        num_channels: int,
        num_outputs: int,
        conv_size: int = defaults.CONV_SIZE,
        layer_idx: int | None = None,
        use_rope: bool = False,
        **unknown: Any,
    ):
        for name in unknown:
            # Python's own error would name this class instead of the mixer.
            names = {key for cls in type(self).__mro__[:-1] for key in inspect.signature(cls).parameters}
            message = f"{type(self).__name__}() got an unexpected keyword argument {name!r}"
            raise TypeError(message + did_you_mean(name, names))
        if use_rope and not self.supports_rope:
            raise ValueError(
                f"expected use_rope=False, found True: {type(self).__name__} has no rotary embedding"
            )
        check_conv_size(conv_size)
        if layer_idx is not None:
            check_sizes(0, layer_idx=layer_idx)
        super().__init__()
        # Not asked of the projections, as an adapter in their place need not say them.
        self.hidden_size, self.num_channels = hidden_size, num_channels
        self.conv_size, self.layer_idx, self.use_rope = conv_size, layer_idx, use_rope
        # One projection and one convolution for queries, keys and values: fewer and larger products.
        self.qkv_proj = Linear(hidden_size, num_channels)
        self.qkv_conv = ShortConvolution(num_channels, conv_size) if conv_size else None
        self.o_proj = Linear(num_outputs, hidden_size)
        # An `AttentionMixer` can have one.
        self.output_gate: OutputGate | None = None

    @abstractmethod
    def mix(
        self,
        channels: Tensor,
        hidden_states: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
        **options: Any,
    ) -> Tensor:
        """Mix the tokens of a call with each other and with the cached ones.

        Args:
            channels: `[B, T, num_channels]`, projected and convolved.
            hidden_states: `[B, T, hidden_size]`, the inputs of the layer.
            layout: padding and packing of the call.
            cache: this layer's cache, which is read and updated; or None.
            options: the `forward_options` that the caller gave.

        Returns:
            `[B, T, num_outputs]` in the dtype of `channels`. Padding columns may hold any finite value.
        """

    def begin_step(self) -> Any:
        """The option `step` of `forward` for a training step, fixed before the layer runs; or None.

        With it, gradient checkpointing recomputes the same results in the backward pass, even if other steps
        ran in between.
        """
        return None

    @classmethod
    def own_fields(cls) -> dict[str, ConfigField]:
        """The config fields declared by this mixer, by name."""
        fields = cls.config_fields.items()
        return {field.name or name: field for name, field in fields if isinstance(field, ConfigField)}

    @classmethod
    def arguments_of(cls, config: Any) -> dict[str, Any]:
        """Constructor arguments from the config of a model."""
        return {
            name: getattr(config, field if isinstance(field, str) else field.name or name)
            for name, field in cls.config_fields.items()
        }

    @classmethod
    def check_config(cls, config: Any) -> None:
        """Raise ValueError if the config of a model has values that such a layer refuses."""

    @classmethod
    def equal_sizes(cls, config: Any) -> dict[str, int]:
        """Values of `own_fields` for which such a layer is as large as an `"ovq"` layer of this config, in
        parameters or in bytes of state; empty if it always is."""
        return {}

    @classmethod
    @abstractmethod
    def memory_of(cls, settings: Any, *, rope_theta: float | None = None) -> Memory:
        """The `Memory` that handles the state of such a layer.

        Args:
            settings: the layer or the config of its model, as both use the same attribute names.
            rope_theta: base of the rotary frequencies of its keys; None without rotary embedding.
        """

    @property
    def memory(self) -> Memory:
        """The `Memory` that handles the state of this layer."""
        return self.memory_of(self)

    @abstractmethod
    def memory_spec(self, num_tokens: int, dtype: torch.dtype) -> StateSpec:
        """Specification of the state of `mix` for one row after `num_tokens` (at least 1) in `dtype`."""

    def state_spec(self, num_tokens: int, dtype: torch.dtype = torch.float32) -> StateSpec:
        """Specification of all tensors in this layer's cache for one row: `memory_spec` and the convolution's
        last inputs.

        Args:
            num_tokens: number of tokens that the row has read, at least 1, without padding.
            dtype: dtype of the activations.
        """
        spec: StateSpec = {}
        if self.conv_size:
            spec["conv_state"] = ((self.num_channels, self.conv_size - 1), dtype)
        return spec | self.memory_spec(num_tokens, dtype)

    def state_bytes(self, num_tokens: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of this layer's cache for one row after `num_tokens` tokens, for activations in `dtype`.

        Computed from the specification; equal to the `nbytes` of a real cache.
        """
        return num_bytes(self.state_spec(num_tokens, dtype)) if num_tokens else 0

    @property
    def has_bounded_state(self) -> bool:
        """Whether the size of the state is bounded for any number of tokens."""
        many, more = (self.state_bytes(num_tokens) for num_tokens in (2**60, 2**61))
        return many == more

    def check_state(
        self, where: str, tensors: Mapping[str, Tensor], *, num_tokens: int, dtype: torch.dtype
    ) -> None:
        """Raise ValueError, naming the file `where`, unless its `tensors` are a valid state of this layer.

        They are those of `state_spec` for these arguments, of one row; `num_seen`, if it is among them, is
        `num_tokens`.
        """
        check_tensors(where, tensors, of_rows(self.state_spec(num_tokens, dtype), 1))
        if "num_seen" in tensors:
            check_num_seen(where, tensors, num_tokens)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | SequenceLayout | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """Mix a sequence, or the next part of one.

        Args:
            hidden_states: `[B, T, hidden_size]`.
            attention_mask: `[B, P + T]` of 0 and 1 for the P cached and T new columns, real tokens
                contiguous, padding left or right. None: all tokens are real.
            past_key_values: a `MixerCache` or `ovq.hf.OVQCache` from an earlier call; updated in place.
            use_cache: whether to create a `MixerCache` if none was given.
            output_attentions: must be False, as no mixer forms its attention matrix.
            kwargs: `cu_seqlens` `[R + 1]` for rows packed into one, and the `forward_options` of the mixer.
                What models are given is ignored: `num_items_in_batch` of the Trainer, and a few more.

        Returns:
            `[B, T, hidden_size]` (zero at padding), None, and the cache or None.

        Raises:
            ValueError: if the input has a wrong shape, or a keyword argument is unknown.
        """
        kwargs = {name: given for name, given in kwargs.items() if name not in _OF_MODELS}
        check_kwargs(kwargs, self.forward_options | {"cu_seqlens"}, output_attentions=output_attentions)
        self._check_hidden_states(hidden_states)
        batch_size, num_new, _ = hidden_states.shape
        if past_key_values is None and use_cache:
            past_key_values = MixerCache()
        cache = None if past_key_values is None else self.cache_of_layer(past_key_values)
        layout = SequenceLayout.of(
            attention_mask,
            batch_size=batch_size,
            num_past=0 if cache is None else cache.get_seq_length(),
            num_new=num_new,
            cu_seqlens=kwargs.pop("cu_seqlens", None),
        )
        if cache is not None:
            check_cache_use(cache, layout)
            # A graph for any number of rows does not compare them.
            if not torch.compiler.is_compiling() and (num_rows := cache.num_rows) not in (0, batch_size):
                raise ValueError(f"past_key_values: expected {batch_size} rows, found {num_rows}")
        if layout.new_mask is not None:
            # Zero times what padding may hold, such as NaN, would reach other tokens and the gradients.
            hidden_states = hidden_states.masked_fill(~layout.new_mask[..., None], 0)

        channels, conv_state = self.qkv_proj(hidden_states), None
        if self.qkv_conv is not None:
            channels, conv_state = self.qkv_conv(
                channels, None if cache is None else cache.conv_state, layout
            )
        if cache is None:
            mix: Callable[..., Tensor] = functools.partial(self.mix, cache=None, **kwargs)
            tokens = channels, hidden_states
            o = layout.in_groups(mix, *tokens) if self.runs_in_groups else mix(*tokens, layout)
            return self.projected(o, hidden_states, layout.new_mask), None, None
        before = cache.state, cache.num_columns
        try:
            o = self.mix(channels, hidden_states, layout, cache, **kwargs)
            o = self.projected(o, hidden_states, layout.new_mask)
        except BaseException:
            # A failed call leaves the cache unchanged: states are values, so the earlier one is intact.
            cache.state, cache.num_columns = before
            raise
        cache.conv_state, cache.has_padding = conv_state, layout.mask is not None
        if not torch.compiler.is_compiling() and cache.note_reader(self):
            found = "without layer_idx" if self.layer_idx is None else "with the same layer_idx"
            warnings.warn(
                f"past_key_values: several layers {found} read tokens in turns into its layer "
                f"{self.layer_idx or 0}, so each sees those of the others; expected layer_idx=0, 1, ... for "
                "the layers of a model (copies of a model that share a cache on purpose can ignore this)",
                stacklevel=2,
            )
        return o, None, past_key_values

    def projected(self, o: Tensor, hidden_states: Tensor, new_mask: Tensor | None = None) -> Tensor:
        """Outputs of the layer from those of `mix`.

        Args:
            o: `[B, T, num_outputs]`.
            hidden_states: `[B, T, hidden_size]`, the inputs of the layer.
            new_mask: `[B, T]` bool, False at padding; None for none.
        """
        if self.output_gate is not None:
            o = self.output_gate(o, hidden_states)
        if new_mask is not None:
            o = o.masked_fill(~new_mask[..., None], 0)
        return self.o_proj(o)

    def cache_of_layer(self, past_key_values: Any) -> LayerCache:
        """This layer's cache within `past_key_values`, created if missing.

        Raises:
            ValueError: if it is the cache of another kind of layer.
        """
        layers = getattr(past_key_values, "layers", None)
        if not isinstance(layers, list):
            raise ValueError(
                "expected past_key_values to be a MixerCache or an OVQCache, "
                f"found {type(past_key_values).__name__}"
            )
        idx = self.layer_idx or 0
        layers.extend([None] * (idx + 1 - len(layers)))
        memory = self.memory
        if layers[idx] is None:
            layers[idx] = LayerCache(memory)
        found = getattr(layers[idx], "memory", None)
        if found != memory:
            found = type(layers[idx]).__name__ if found is None else found.kind
            raise ValueError(f"expected layer {idx} of past_key_values to hold {memory.kind}, found {found}")
        return layers[idx]

    def _check_hidden_states(self, hidden_states: Tensor) -> None:
        is_tensor, width = isinstance(hidden_states, Tensor), self.hidden_size
        shape = list(hidden_states.shape) if is_tensor else []
        if len(shape) != 3 or shape[2] != width or shape[1] == 0:
            found = shape if is_tensor else type(hidden_states).__name__
            raise ValueError(f"expected hidden_states of shape [batch, tokens >= 1, {width}], found {found}")


def check_cache_use(cache: LayerCache, layout: SequenceLayout) -> None:
    """Refuse uses of a cache that would silently give wrong results."""
    if layout.cu_seqlens is not None:
        raise ValueError("expected no cache together with cu_seqlens: packed rows cannot be continued")
    if cache.has_padding and not layout.has_mask:
        raise ValueError(
            "expected an attention_mask over cached and new columns, as some of the cached ones are padding; "
            "found none"
        )
