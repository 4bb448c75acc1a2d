"""What a mixer keeps between calls, without transformers: the cache of a layer that stands alone.

`ovq.hf.cache` builds transformers' cache from the same parts, so a mixer handles both alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ovq.ops import OVQState


class ConvStateMixin:
    """Adds the state of the short convolution to a layer cache, and applies batch operations to it too.

    Mixed in *before* the class that holds the mixer's own memory. That class has the methods used here:
    transformers' `reorder_cache`, `batch_repeat_interleave`, `batch_select_indices`, `reset`, and
    `memory_nbytes`.

    Attributes:
        conv_state: `[B, D, conv_size - 1]` last inputs of the convolution, or None.
        has_padding: whether a cached column is padding, so that later calls need the mask of it.
    """

    conv_state: Tensor | None = None
    has_padding: bool = False

    def _map_conv(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.conv_state is not None:
            self.conv_state = function(self.conv_state)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.conv_state, self.has_padding = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, `[B]`: the step between two tokens of a beam search."""
        super().reorder_cache(beam_idx)
        self._map_conv(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times in a row."""
        super().batch_repeat_interleave(repeats)
        self._map_conv(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        super().batch_select_indices(indices)
        self._map_conv(lambda t: t[indices.to(t.device)])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept for all rows."""
        conv = 0 if self.conv_state is None else self.conv_state.nbytes
        return self.memory_nbytes() + conv


class _Slots:
    """The memory of an OVQ layer: an `OVQState`, and how many columns (padding included) went in."""

    def __init__(self) -> None:
        super().__init__()
        self.state: OVQState | None = None
        self.num_columns = 0

    def set_state(self, state: OVQState, num_new: int) -> None:
        """Keep the state after `num_new` more columns."""
        self.state = state
        self.num_columns += num_new

    def get_seq_length(self) -> int:
        """Columns cached, padding included."""
        return self.num_columns

    def reset(self) -> None:
        self.state, self.num_columns = None, 0

    def _map_state(self, function: Callable[[OVQState], OVQState]) -> None:
        if self.state is not None:
            self.state = function(self.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_state(lambda s: s.reorder(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_state(lambda s: s.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_state(lambda s: s.select(indices))

    def memory_nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes


class SlotCache(ConvStateMixin, _Slots):
    """Cache of one OVQ layer: its `OVQState` and the state of its convolution.

    Example:
        >>> cache = SlotCache()
        >>> cache.get_seq_length(), cache.nbytes
        (0, 0)
    """

    kind = "an OVQState"


class _Tensors:
    """The memory of a mixer that keeps a few tensors, of one size whatever the length; rows come first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.state: dict[str, Tensor] | None = None
        self.num_columns = 0

    def set_state(self, state: dict[str, Tensor], num_new: int) -> None:
        """Keep the tensors, each `[B, ...]`, after `num_new` more columns."""
        self.state = state
        self.num_columns += num_new

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.num_columns

    def reset(self) -> None:
        self.state, self.num_columns = None, 0

    def _map_state(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = {name: function(tensor) for name, tensor in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_state(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_state(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_state(lambda t: t[indices.to(t.device)])

    def memory_nbytes(self) -> int:
        return 0 if self.state is None else sum(tensor.nbytes for tensor in self.state.values())


class StateCache(ConvStateMixin, _Tensors):
    """Cache of a mixer with a state of constant size: its tensors and the state of its convolution.

    Args:
        kind: what it holds, in words.

    Example:
        >>> cache = StateCache("the state of linear attention")
        >>> cache.set_state({"kv_sum": torch.zeros(2, 4, 8, 9)}, num_new=5)
        >>> cache.get_seq_length(), cache.nbytes
        (5, 2304)
    """


class _KeysAndValues:
    """The memory of an attention layer: all keys and values, or the last `window - 1` of them."""

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.num_columns = 0

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append `[B, Hkv, T, K]` and `[B, Hkv, T, V]`; return all that the new tokens may look at."""
        self.num_columns += keys.shape[2]
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        if self.window is not None:
            kept = min(keys.shape[2], self.window - 1)
            # Copies: a view would keep the whole sequence alive.
            self.keys = keys[:, :, keys.shape[2] - kept :].clone()
            self.values = values[:, :, values.shape[2] - kept :].clone()
        return keys, values

    def get_seq_length(self) -> int:
        """Columns seen, padding and those outside the window included."""
        return self.num_columns

    def reset(self) -> None:
        self.keys, self.values, self.num_columns = None, None, 0

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.keys is not None:
            self.keys, self.values = function(self.keys), function(self.values)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])

    def memory_nbytes(self) -> int:
        return 0 if self.keys is None else self.keys.nbytes + self.values.nbytes


def key_value_kind(window: int | None) -> str:
    """What a cache of keys and values holds, in words: a mixer takes no cache that keeps too little."""
    return "all keys and values" if window is None else f"the keys and values of a window of {window}"


class KeyValueCache(ConvStateMixin, _KeysAndValues):
    """Cache of one attention layer: keys, values and the state of its convolution.

    Args:
        window: keep the last `window - 1` tokens only; None keeps all.

    Example:
        >>> cache = KeyValueCache(window=4)
        >>> keys, _ = cache.update(torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 10, 8))
        >>> keys.shape[2], cache.keys.shape[2], cache.get_seq_length()
        (10, 3, 10)
    """

    @property
    def kind(self) -> str:
        """What it holds."""
        return key_value_kind(self.window)


class MixerCache:
    """The caches of a stack of mixers; each mixer adds its own on first use.

    Example:
        >>> from ovq.layers import FullAttention
        >>> layer = FullAttention(16, 2, conv_size=3)
        >>> x = torch.randn(1, 5, 16)
        >>> whole, _, _ = layer(x)
        >>> first, _, cache = layer(x[:, :3], use_cache=True)
        >>> second, _, cache = layer(x[:, 3:], past_key_values=cache)
        >>> torch.allclose(torch.cat([first, second], 1), whole, atol=1e-6)
        True
    """

    def __init__(self) -> None:
        self.layers: list[SlotCache | StateCache | KeyValueCache | None] = []

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns cached for a layer."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return 0 if layer is None else layer.get_seq_length()

    def _each(self) -> list[SlotCache | StateCache | KeyValueCache]:
        return [layer for layer in self.layers if layer is not None]

    def reset(self) -> None:
        """Forget everything."""
        for layer in self._each():
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, `[B]`."""
        for layer in self._each():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times in a row."""
        for layer in self._each():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        for layer in self._each():
            layer.batch_select_indices(indices)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept for all layers and rows."""
        return sum(layer.nbytes for layer in self._each())
