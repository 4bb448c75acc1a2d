"""Caches of layers between calls, independent of transformers; `ovq.hf.cache` builds on them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ovq.layers.memory import Memory
from ovq.ops.options import check_sizes
from ovq.ops.rows import checked_rows

if TYPE_CHECKING:
    from typing_extensions import Self


class LayerCache:
    """Cache of one layer: the state of its mixer and the last inputs of its convolution.

    Args:
        memory: the mixer's `Memory`, which handles the state.

    Attributes:
        state: the state set by the mixer, with rows as the first dimension; None before the first token.
        conv_state: `[B, D, conv_size - 1]` last inputs of the convolution, or None.
        num_columns: number of columns read, including padding.
        has_padding: whether any column read is padding, so that later calls need a mask.

    Example:
        >>> from ovq.layers.memory import TensorMemory
        >>> cache = LayerCache(TensorMemory(kind="the sums of linear attention"))
        >>> cache.set_state({"kv_sum": torch.zeros(2, 4, 8, 9)}, num_new=5)
        >>> cache.get_seq_length(), cache.nbytes
        (5, 2304)
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        LayerCache.reset(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.memory.kind}, columns={self.num_columns}, {self.nbytes:,} bytes)"

    def reset(self) -> None:
        """Forget everything."""
        self.state: Any = None
        self.conv_state: Tensor | None = None
        self.num_columns = 0
        self.has_padding = False
        self._readers: list[weakref.ref[Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """What copies and files get: everything but the layers that read this."""
        return self.__dict__ | {"_readers": []}

    def note_reader(self, layer: Any) -> bool:
        """Note that `layer` has read tokens into this cache. Returns whether layers do so in turns."""
        readers = [reader() for reader in self._readers]
        if readers and readers[-1] is layer:
            return False
        others = [reader for reader in readers if reader is not None and reader is not layer]
        self._readers = [weakref.ref(reader) for reader in (*others, layer)]
        return layer in readers

    def branch(self) -> Self:
        """An independent copy of the cache. States are values, so no tensor is copied."""
        return copy.copy(self)

    def set_state(self, state: Any, num_new: int) -> None:
        """Store the state after `num_new` more columns."""
        self.state = state
        self.num_columns += num_new

    def get_seq_length(self) -> int:
        """Number of columns read, including padding and columns no longer kept."""
        return self.num_columns

    @property
    def num_rows(self) -> int:
        """Number of rows, B; 0 before the first token."""
        return 0 if self.state is None else len(next(iter(self.memory.tensors(self.state).values())))

    @property
    def nbytes(self) -> int:
        """Total bytes of the tensors of all rows."""
        return sum(tensor.nbytes for tensor in self.parts().values())

    def _change(self, of_state: Callable[[Any], Any], of_tensor: Callable[[Tensor], Tensor]) -> None:
        """Replace the state and the convolution's state by the results of one function each."""
        if self.state is not None:
            self.state = of_state(self.state)
        if self.conv_state is not None:
            self.conv_state = of_tensor(self.conv_state)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a boolean mask), in their order.

        Raises:
            ValueError: if these are not rows of the cache, which then does not change.
        """
        if self.state is not None:
            # Checked here, as not every mixer does, and no layer of a model may change before an error.
            indices = checked_rows(indices, self.num_rows)
        self._change(lambda s: self.memory.select(s, indices), lambda t: t[indices.to(t.device)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` `[B]`, as a beam search does between two tokens."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times consecutively.

        Raises:
            ValueError: if `repeats` is less than 1.
        """
        check_sizes(1, repeats=repeats)
        self.batch_select_indices(torch.arange(self.num_rows, device="cpu").repeat_interleave(repeats))

    def move_to(self, device: torch.device | str) -> None:
        """Move everything to a device."""
        self._change(lambda s: self.memory.to(s, device), lambda t: t.to(device, non_blocking=True))

    def detach_(self) -> None:
        """Detach all tensors from the autograd graph that made them."""
        self._change(self.memory.detach, Tensor.detach)

    def parts(self) -> dict[str, Tensor]:
        """The tensors by name, on their device and with their autograd graph; see `Mixer.state_spec`."""
        return self._conv_part() | ({} if self.state is None else self.memory.tensors(self.state))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save by name, detached and on the CPU."""
        conv = {name: t.detach().cpu().contiguous() for name, t in self._conv_part().items()}
        return conv | self.memory.saved(self.state)

    def _conv_part(self) -> dict[str, Tensor]:
        return {} if self.conv_state is None else {"conv_state": self.conv_state}

    def restore(
        self, tensors: Mapping[str, Tensor], num_columns: int, device: torch.device | str | None = None
    ) -> None:
        """Fill this empty cache with the `tensors` or `parts` of another one.

        Args:
            tensors: by name.
            num_columns: number of columns that the other cache has read.
            device: target device; None keeps the tensors' device.
        """
        own = dict(tensors)
        conv_state = own.pop("conv_state", None)
        self.conv_state = None if conv_state is None else conv_state.to(device)
        self.set_state(self.memory.restored(own, device), num_columns)

    def join(self, caches: Sequence[LayerCache], num_columns: int) -> None:
        """Fill this empty cache with the rows of other caches, padded left to `num_columns` columns."""
        conv_states = [cache.conv_state for cache in caches if cache.conv_state is not None]
        if conv_states:
            self.conv_state = torch.cat(conv_states)
        num_missing = [num_columns - cache.num_columns for cache in caches]
        self.has_padding = any(cache.has_padding for cache in caches) or max(num_missing) > 0
        self.set_state(self.memory.concatenate([cache.state for cache in caches], num_missing), num_columns)

    @property
    def num_by_column(self) -> int:
        """Number of last columns that the state stores individually, so that it needs a mask for them."""
        return 0 if self.state is None else self.memory.num_by_column(self.state)

    def drop_columns(self, num_dropped: int) -> None:
        """Remove the first `num_dropped` columns, padding or columns no longer kept, as if never read."""
        num_left = self.num_columns - num_dropped
        self.state = self.memory.without_columns(self.state, num_dropped, num_left)
        self.num_columns = num_left


class MixerCache:
    """Caches of a stack of mixers; each mixer adds its cache on first use.

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
        self.layers: list[LayerCache | None] = []

    def __repr__(self) -> str:
        return f"MixerCache(layers={self.layers})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns that a layer has read."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return 0 if layer is None else layer.get_seq_length()

    def _each(self) -> list[LayerCache]:
        return [layer for layer in self.layers if layer is not None]

    def reset(self) -> None:
        """Forget everything."""
        for layer in self._each():
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` `[B]`."""
        for layer in self._each():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times consecutively."""
        for layer in self._each():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        for layer in self._each():
            layer.batch_select_indices(indices)

    @property
    def nbytes(self) -> int:
        """Total bytes of the tensors of all layers and rows."""
        return sum(layer.nbytes for layer in self._each())
