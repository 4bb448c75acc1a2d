"""Caches of models in transformers; with `generation.py`, all code that depends on its version.

Version 5.24 renamed `past_key_values` to `cache` nearly everywhere; `CACHE_KEY` is the name that the
installed version uses.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.cache_utils import CacheLayerMixin

from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers import LayerCache, mixer_class
from ovq.ops import OVQState

if TYPE_CHECKING:
    from typing_extensions import Self

#: Name of the cache among the arguments of `forward` that `generate` uses, and in model outputs.
CACHE_KEY = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


#: Most tokens that a cache records for `crop`.
MOST_CROPPED = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """What `OVQCache.crop` needs to undo the last tokens.

    Attributes:
        layers: the cache's layers before the tokens.
        inputs: `[B, T, D]` embeddings of the tokens.
        mask: `[B, P + T]` attention mask of that call, if any.
        model: a weak reference to the `OVQModel` that read them, so that deep copies do not copy the model.
        earlier: what was recorded before these tokens, once there are too many for one record.
    """

    layers: list[OVQCacheLayer]
    inputs: Tensor
    mask: Tensor | None
    model: Callable[[], Any]
    earlier: Recorded | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that can be cropped."""
        return self.inputs.shape[1] + (0 if self.earlier is None else self.earlier.num_tokens)


class OVQCacheLayer(LayerCache, CacheLayerMixin):
    """The cache of one layer of an OVQ model, for any mixer."""

    #: Whether the layer records what it reads, so that it can be cropped; transformers' name.
    record_past = False
    supports_early_init = False
    #: The device on which the state is used.
    device: torch.device | None = None

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]  # an attribute in most layers of transformers
        """Whether the last tokens can be cropped."""
        return self.record_past

    def activate_past_recording(self, recurrent_states_to_keep: int | None = None) -> None:
        """Record the next tokens, so that they can be cropped: transformers' name.

        `recurrent_states_to_keep`, the number of tokens to be cropped, is ignored: all can be.
        """
        self.record_past = True

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]  # an attribute in transformers
        """Whether there is a state."""
        return self.state is not None

    @property
    def slot_states(self) -> list[OVQState]:
        """The states with slots; in converted models one for each group of heads with equal budgets."""
        return [self.state] if isinstance(self.state, OVQState) else []

    # `keys` and `values` are transformers' names.
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]  # likewise
        """`[B, Hkv, S, K]` if the mixer keeps keys, else None."""
        return self.parts().get("keys")

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]  # likewise
        """`[B, Hkv, S, V]` if the mixer keeps values, else None."""
        return self.parts().get("values")

    def set_state(self, state: Any, num_new: int) -> None:
        """Store the state after `num_new` more columns."""
        super().set_state(state, num_new)
        self.device = next(iter(self.memory.tensors(state).values())).device

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the mixer makes the state."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Not supported: the mixer sets the state."""
        raise NotImplementedError("this layer keeps a state that its mixer makes: use set_state")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the columns that a mask must cover: all columns."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Always -1, which means no bound."""
        return -1

    def offload(self) -> None:
        """Move everything to the CPU."""
        self.move_to("cpu")

    def prefetch(self) -> None:
        """Move everything back to the device it came from."""
        if self.device is not None:
            self.move_to(self.device)


def not_croppable(tokens_to_remove: int, num_recorded: int) -> ValueError:
    """The error for a `crop` of more tokens than were recorded, or of a positive number."""
    return ValueError(
        f"expected crop(n) with n from {-num_recorded} to 0, found crop({tokens_to_remove}): only "
        "tokens read since activate_past_recording() and the last crop can be removed; to go back further, "
        "keep a snapshot of the cache (snapshot())"
    )


class StateCache(Cache):
    """Base class of `OVQCache` and of the cache of converted models: one state per layer."""

    layers: list[OVQCacheLayer]  # type: ignore[assignment]  # transformers' may be of other kinds
    #: Columns of the prompt, during assisted decoding.
    num_prompt: int | None = None
    #: Whether an assistant drafts with it.
    is_of_assistant = False

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(layers={len(self.layers)}, rows={self.num_rows}, "
            f"columns={self.get_seq_length()}, {self.nbytes:,} bytes)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept for all layers and rows."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def num_rows(self) -> int:
        """Rows B; 0 before the first token."""
        return self.layers[0].num_rows

    @property
    def is_recording(self) -> bool:
        """Whether the next tokens will be recorded."""
        return self.layers[0].record_past

    @property
    def num_columns(self) -> int:
        """Number of columns that every layer has read.

        Raises:
            ValueError: layers have read different numbers, because a call failed or was interrupted.
        """
        num = self.layers[0].num_columns
        if torch.compiler.is_compiling():
            # A graph would have one number per layer, and its compiler would not know that they are equal.
            return num
        for layer in self.layers:
            if layer.num_columns != num:
                raise ValueError(
                    f"expected a cache whose layers have all read {num} columns, found {layer.num_columns}: "
                    "a call failed half-way; continue from an earlier snapshot (snapshot())"
                )
        return num

    def snapshot(self) -> Self:
        """An independent cache with the same content, for branching or for undoing rejected tokens.

        It costs almost nothing: the two caches share tensors, but changes to one do not affect the other.

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
        branch.layers = [layer.branch() for layer in self.layers]
        return branch

    def selected(self, rows: Sequence[int]) -> Self:
        """A copy of these rows, in this order; repeats are allowed."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        # This copies the tensors.
        other.batch_select_indices(torch.tensor(rows, dtype=torch.int64, device="cpu"))
        return other

    def reset_beyond(self, tokens_to_remove: int, num_recorded: int) -> bool:
        """Empty an assistant's cache that cannot be cropped that far; returns whether it did.

        An assistant with a tokenizer of its own encodes the last words again with every draft, which may
        change tokens read long before. It is given the whole text each time, and so reads all of it again.
        """
        if not self.is_of_assistant or tokens_to_remove >= -num_recorded:
            return False
        self.reset()
        return True

    def detach_(self) -> None:
        """Detach all tensors from their graph, so that no gradient flows to the tokens read so far."""
        for layer in self.layers:
            layer.detach_()

    def shorten(self, lengths: Sequence[int]) -> int:
        """Drop the first columns that no later call needs, so that masks stay short.

        These are columns that are padding in every row, and columns of which no layer keeps an entry of its
        own. In a model of OVQ and sliding-window layers, only a window is left of a text of any length. The
        memory of the rows stays the same; rotary keys are rotated back to lower positions, which rounds them.

        Args:
            lengths: number of tokens that each row has read, without padding on the left.

        Returns:
            Number of columns left, with which later masks begin; at least 1.

        Raises:
            ValueError: not one length for each row.

        Example:
            >>> from ovq.hf import OVQConfig, OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model, cache = OVQModel(config).eval(), OVQCache(config)
            >>> _ = model(torch.zeros(1, 1000, dtype=torch.long), past_key_values=cache)
            >>> cache.shorten([1000]), config.sliding_window
            (127, 128)
        """
        if len(lengths) != self.num_rows or not lengths:
            raise ValueError(
                f"lengths: expected one for each of {self.num_rows} rows, found {len(lengths)} of them"
            )
        num_columns = self.get_seq_length()
        by_column = max(layer.num_by_column for layer in self.layers)
        num_left = max(1, min(num_columns, by_column, max(lengths)))
        if num_left < num_columns:
            for layer in self.layers:
                layer.drop_columns(num_columns - num_left)
        return num_left

    @classmethod
    def concatenate(cls, caches: Sequence[Self], config: Any = None) -> Self:
        """One cache with the rows of several, for rows that join a running batch. The inputs do not change.

        Rows with fewer columns than the longest are padded on the left: later calls need an `attention_mask`
        over all columns, with zeros at this padding. Converted models count positions by columns: give them
        `position_ids` as well.

        Args:
            caches: of one model; each has read at least one column.
            config: ignored; earlier versions required the model's config.

        Raises:
            ValueError: no caches, an empty one among them, or states of different sizes.

        Example:
            >>> from ovq.hf import OVQConfig, OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model, long, short = OVQModel(config).eval(), OVQCache(config), OVQCache(config)
            >>> _ = model(torch.tensor([[1, 2, 3]]), past_key_values=long)
            >>> _ = model(torch.tensor([[4]]), past_key_values=short)
            >>> both = OVQCache.concatenate([long, short])
            >>> mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
            >>> _ = model(torch.tensor([[5], [6]]), mask, past_key_values=both)
        """
        lengths = [cache.get_seq_length() for cache in caches]
        if not lengths or min(lengths) == 0:
            raise ValueError(f"expected caches that have read at least one column, found lengths {lengths}")
        joined = copy.copy(caches[0])
        joined.layers = [copy.copy(layer) for layer in joined.layers]
        joined.reset()
        for layer, parts in zip(
            joined.layers, zip(*(cache.layers for cache in caches), strict=True), strict=True
        ):
            layer.join(parts, max(lengths))
        return joined


class OVQCache(StateCache):
    """Cache of an OVQ model: the states of the mixers of all layers.

    Example:
        >>> from ovq.hf import OVQConfig
        >>> cache = OVQCache(OVQConfig(num_hidden_layers=2))
        >>> [layer.memory.kind for layer in cache.layers], cache.nbytes
        (['the keys and values of a window of 128', 'an OVQState'], 0)
    """

    def __init__(self, config: OVQConfig):
        rope_thetas = dict.fromkeys(config.rope_mixers, config.rope_theta)
        super().__init__(
            layers=[
                OVQCacheLayer(mixer_class(name).memory_of(config, rope_theta=rope_thetas.get(name)))
                for name in config.mixer_types
            ]
        )
        #: The last tokens that `crop` can remove; None if nothing was recorded.
        self.recorded: Recorded | None = None

    # Changes of rows or columns invalidate what was recorded.
    def reset(self) -> None:
        """Forget everything: transformers' name."""
        self.recorded = None
        super().reset()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows, in their order: transformers' name."""
        super().batch_select_indices(indices)
        self.recorded = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row: transformers' name."""
        super().batch_repeat_interleave(repeats)
        self.recorded = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows of these beams: transformers' name."""
        super().reorder_cache(beam_idx)
        self.recorded = None

    def shorten(self, lengths: Sequence[int]) -> int:
        """See `StateCache.shorten`."""
        num_left = super().shorten(lengths)
        self.recorded = None
        return num_left

    def to_record(self, model: Any, inputs: Tensor, mask: Tensor | None) -> Recorded:
        """The `Recorded` for cropping the next tokens, to be set once the model has read them.

        Tokens recorded earlier and not cropped are kept too, up to `MOST_CROPPED` in one record, and the full
        record before it: so at least the last `MOST_CROPPED` can be cropped.
        """
        recorded = self.recorded
        if recorded is not None and recorded.inputs.shape[1] + inputs.shape[1] <= MOST_CROPPED:
            joined = torch.cat([recorded.inputs, inputs], 1)
            return dataclasses.replace(recorded, inputs=joined, mask=mask, model=weakref.ref(model))
        earlier = None if recorded is None else dataclasses.replace(recorded, earlier=None)
        return Recorded([layer.branch() for layer in self.layers], inputs, mask, weakref.ref(model), earlier)

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` of the tokens recorded since the last crop.

        A state cannot forget, so the cache returns to its state before the recorded tokens, and the model
        reads again those that stay.

        Raises:
            ValueError: more tokens than were recorded since rows were selected, repeated or joined; a number
                above 0; the model was deleted. The cache is then unchanged.
        """
        recorded, self.recorded = self.recorded, None
        num_recorded = 0 if recorded is None else recorded.num_tokens
        if tokens_to_remove == 0 or self.reset_beyond(tokens_to_remove, num_recorded):
            return
        if recorded is None or not -num_recorded <= tokens_to_remove < 0:
            self.recorded = recorded
            raise not_croppable(tokens_to_remove, num_recorded)
        first, num_kept = recorded, recorded.inputs.shape[1] + tokens_to_remove
        if num_kept < 0 and recorded.earlier is not None:
            first, num_kept = recorded.earlier, num_recorded + tokens_to_remove
        kept, model = first.inputs[:, :num_kept], first.model()
        if kept.shape[1] and model is None:
            self.recorded = recorded
            raise ValueError(
                f"crop({tokens_to_remove}): expected the model that read these tokens, which must read the "
                "remaining ones again, found that it was deleted: keep it, or a snapshot of the cache"
            )
        self.layers = [layer.branch() for layer in first.layers]
        if kept.shape[1]:
            num_columns = self.num_columns + kept.shape[1]
            # Without a mask no column was padding any more, though one may have been before these tokens.
            mask = kept.new_ones(len(kept), num_columns) if first.mask is None else first.mask
            mask = mask[:, :num_columns]
            model(inputs_embeds=kept, attention_mask=mask, **{CACHE_KEY: self})
            self.recorded = None


def one_cache(past_key_values: Any, cache: Any) -> OVQCache | None:
    """The cache that a caller passed under either of its names.

    Raises:
        ValueError: different objects under the two names, or something other than an `OVQCache`.
    """
    found = one_of(past_key_values, cache)
    if found is not None and not isinstance(found, OVQCache):
        raise ValueError(
            f"expected an OVQCache (ovq.hf.OVQCache(config)) as cache, found {type(found).__name__}"
        )
    return found


def one_of(past_key_values: Any, cache: Any) -> Any:
    """The argument passed under either of two names; ValueError if two different caches were passed."""
    if past_key_values is not None and cache is not None and past_key_values is not cache:
        for found in (past_key_values, cache):
            if not isinstance(found, StateCache):
                # That of peft's prefix tuning, which callers refuse by its type.
                return found
        raise ValueError(
            "expected one of past_key_values and cache, which are the same argument; found two caches"
        )
    return cache if past_key_values is None else past_key_values
