"""`MemoryCache`: the cache of a converted model, of constant size, for transformers.

transformers calls `Cache.update` before the attention function. A layer here only hands the new keys and
values on, marked as its own; the attention function finds the memory by that mark and reads and updates it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ovq.convert.compiled import advance_compiled, is_compiled
from ovq.convert.config import Budget, LayerConfig, MemoryConfig
from ovq.convert.memory import HeadMemory

_MARK = "_ovq_memory_layer"


class MemoryLayer(CacheLayerMixin):
    """The memory of one layer of a converted model.

    Args:
        config: what the layer keeps.

    Attributes:
        memories: the memory of each group of heads with equal budgets; None before the first token.
    """

    is_croppable = False
    is_compileable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self, config: LayerConfig) -> None:
        super().__init__()
        self.config = config
        self.memories: list[HeadMemory] | None = None
        self.device: torch.device | None = None
        self._num_columns = 0
        self._has_staged = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the empty memory, of the sizes of these keys `[B, Hkv, T, K]` and values."""
        self.memories = []
        for budget in self.config.budgets:
            k, v = (x[:, : len(budget.heads)] for x in (key_states, value_states))
            self.memories.append(HeadMemory(budget, k, v, self._use(budget, k, v)))
        self.device = key_states.device
        self.is_initialized = True

    def _use(self, budget: Budget, k: Tensor, v: Tensor) -> Tensor | None:
        if (numbers := self.config.token_use) is None:
            return None
        found = [numbers[head] for head in budget.heads]
        if {*map(len, found)} != {expected := k.shape[3] + v.shape[3] + 1}:
            raise ValueError(
                f"token_use: expected {expected} numbers per head, found {sorted({*map(len, found)})}"
            )
        return torch.tensor(found, dtype=torch.float32, device=k.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand keys and values on to the attention function, marked as those of this layer.

        Raises:
            ValueError: the keys handed on before have not reached the attention function of this package.
        """
        if self._has_staged:
            raise ValueError(
                "expected a model that passes its keys from Cache.update to the attention function of its "
                "config, found one that does not: it cannot be converted"
            )
        self._has_staged = True
        key_states = key_states.view_as(key_states)
        setattr(key_states, _MARK, self)
        return key_states, value_states

    def learn(self, k: Tensor, v: Tensor) -> None:
        """Read tokens `[B, Hkv, T, K]`, `[B, Hkv, T, V]` without queries, all of them real.

        Raises:
            ValueError: as `attend`.
        """
        self._check_fits(k, v)
        if self.memories is None:
            self.lazy_initialization(k, v)
        assert self.memories is not None
        self._num_columns += k.shape[2]
        if self.config.key_exponents is not None:
            k = k * key_factors(self.config.key_exponents, k)
        lengths = [k.shape[2]] * len(k)
        for done, now in self._parts(lengths):
            part = slice(done[0], done[0] + now[0])
            for memory in self.memories:
                heads = list(memory.budget.heads)
                memory.learn(k[:, heads, part], v[:, heads, part])
            self._bring_nearer(now)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Outputs `[B, H, T, V]` of new tokens, which the layer then remembers.

        Args:
            q: `[B, H, T, K]` queries, scaled. k: `[B, Hkv, T, K]`. v: `[B, Hkv, T, V]`.
            mask: `[B, T]`, which tokens are real; None for all.

        Raises:
            ValueError: heads, rows, sizes or dtypes other than those of the memory.
        """
        self._has_staged = False
        self._check_fits(k, v, q)
        if self.memories is None:
            self.lazy_initialization(k, v)
        assert self.memories is not None
        self._num_columns += q.shape[2]
        lengths = [q.shape[2]] * len(q) if mask is None else mask.sum(-1).tolist()
        order = None
        if mask is not None:
            # Real tokens first; where none is missing, this changes nothing.
            order = (~mask).byte().argsort(dim=-1, stable=True)
            q, k, v = (_take(x, order) for x in (q, k, v))
        if self.config.key_exponents is not None:
            per_head = q.shape[1] // self.config.num_kv_heads
            factor = key_factors(self.config.key_exponents, k)
            # By powers of 2, so that scores do not change, bit by bit.
            q, k = q / factor.repeat_interleave(per_head, 0), k * factor
        learned = {"temperature": self.config.slot_temperature, "bias": self.config.slot_bias}
        factors = {
            name: None if x is None else torch.as_tensor(x, device=q.device) for name, x in learned.items()
        }
        if max(lengths) < self._until_turn():
            o = self._attend_part(q, k, v, lengths, **factors)
        else:
            o = q.new_zeros(*q.shape[:3], v.shape[3])
            for done, now in self._parts(lengths):
                if len({*zip(done, now, strict=True)}) == 1:
                    part = slice(done[0], done[0] + now[0])
                    o[:, :, part] = self._attend_part(
                        q[:, :, part], k[:, :, part], v[:, :, part], now, **factors
                    )
                else:
                    first = torch.tensor(done, device=q.device)[:, None]
                    places = first + torch.arange(max(now), device=q.device)
                    places = places.clamp(max=q.shape[2] - 1)
                    own_q, own_k, own_v = (_take(x, places) for x in (q, k, v))
                    found = self._attend_part(own_q, own_k, own_v, now, **factors)
                    for row, (start, num) in enumerate(zip(done, now, strict=True)):
                        o[row, :, start : start + num] = found[row, :, :num]
                self._bring_nearer(now)
        return o if order is None else _take(o, order.argsort(-1))

    def _check_fits(self, k: Tensor, v: Tensor, q: Tensor | None = None) -> None:
        """Raise ValueError unless these tokens are of the model and of the rows whose memory this is.

        Compiled kernels would read and write beyond the tensors.
        """
        num_heads = self.config.num_kv_heads
        if k.shape[1] != num_heads or v.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"expected keys and values of {num_heads} heads, as the config of the memory has, found "
                f"{tuple(k.shape)} and {tuple(v.shape)} (rows, heads, tokens, components)"
            )
        if q is not None and (q.shape[0] != k.shape[0] or q.shape[1] % num_heads or q.shape[3] != k.shape[3]):
            raise ValueError(
                f"expected queries like the keys {tuple(k.shape)}, of a multiple of {num_heads} heads, found "
                f"{tuple(q.shape)} (rows, heads, tokens, components)"
            )
        if self.memories is None:
            return
        kept = self.memories[0]
        expected = len(kept.filled), kept.recent_keys.shape[3], kept.recent_values.shape[3]
        if (found := (k.shape[0], k.shape[3], v.shape[3])) != expected:
            raise ValueError(
                f"expected keys and values of as many rows and components as the cache has, {expected}, "
                f"found {found}: the cache is of another model or another batch"
            )

    def _until_turn(self) -> float:
        """The fewest tokens until something is brought nearer in a row."""
        reach, memories = self.config.reach, self.memories
        if reach is None or memories is None:
            return math.inf
        return min(reach.until_turn(memories[0].num_read(row)) for row in range(self.num_rows))

    def _parts(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Tokens of each row that are done, and how many are next until something is brought nearer."""
        reach, done = self.config.reach, [0] * len(lengths)
        while done != list(lengths):
            now = [n - d for n, d in zip(lengths, done, strict=True)]
            if reach is not None:
                assert self.memories is not None
                now = [
                    min(num, reach.until_turn(self.memories[0].num_read(row))) for row, num in enumerate(now)
                ]
            yield done, now
            done = [d + n for d, n in zip(done, now, strict=True)]

    def _bring_nearer(self, now: Sequence[int]) -> None:
        """Bring nearer what has come to lie too far away in rows that have just read `now` tokens each."""
        reach, memories = self.config.reach, self.memories
        if reach is None or memories is None:
            return
        rows = [row for row, num in enumerate(now) if num and reach.is_turn(memories[0].num_read(row))]
        if not rows:
            return
        ratio = None
        if self.config.key_exponents is not None:
            num = len(reach.frequencies)
            exponents = torch.tensor(self.config.key_exponents, device=memories[0].count.device)
            ratio = torch.exp2(
                (exponents[:, :num] - exponents[:, num : 2 * num]).to(memories[0].key_sum.dtype)
            )
        for memory in memories:
            own = None if ratio is None else ratio[list(memory.budget.heads)]
            memory.bring_nearer_(rows, reach, own)

    def _attend_part(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], **factors: Tensor | None
    ) -> Tensor:
        """Outputs of tokens after which, at the earliest, something is brought nearer."""
        assert self.memories is not None
        per_head = q.shape[1] // self.config.num_kv_heads
        if len(self.memories) == 1:
            return self.memories[0].attend(q, k, v, lengths, **factors)
        if is_compiled(self.memories, k, v, q, *factors.values()):
            o = q.new_zeros(*q.shape[:3], v.shape[3])
            parts = [(memory, memory.budget.heads) for memory in self.memories]
            advance_compiled(parts, k, v, lengths, q=q, o=o, **factors)
        else:
            o = q.new_empty(*q.shape[:3], v.shape[3])
            for memory in self.memories:
                heads = list(memory.budget.heads)
                own = [h * per_head + i for h in heads for i in range(per_head)]
                part = {name: None if x is None else x[own] for name, x in factors.items()}
                o[:, own] = memory.attend(q[:, own], k[:, heads], v[:, heads], lengths, **part)
        return o

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the columns that a mask has to cover: all columns."""
        return self._num_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns read, padding included."""
        return self._num_columns

    def get_max_length(self) -> int:
        """Always -1, which means no bound."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def num_rows(self) -> int:
        """Rows B; 0 before the first token."""
        return 0 if self.memories is None else len(self.memories[0].filled)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept for all rows."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All that is kept, by name."""
        return {
            f"{i}.{name}": tensor
            for i, memory in enumerate(self.memories or [])
            for name, tensor in memory.tensors().items()
        }

    def restore(self, tensors: dict[str, Tensor], num_columns: int) -> None:
        """Take over what `tensors` has returned; the layer has been initialised for as many rows."""
        assert self.memories is not None
        for i, memory in enumerate(self.memories):
            prefix = f"{i}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            memory.restore(own)
        self._num_columns = num_columns

    def clone(self) -> MemoryLayer:
        """A copy that shares nothing with this layer."""
        other = MemoryLayer(self.config)
        other.__dict__.update(self.__dict__)
        if self.memories is not None:
            other.memories = [memory.clone() for memory in self.memories]
        return other

    @staticmethod
    def joined(parts: Sequence[MemoryLayer]) -> MemoryLayer:
        """The rows of several layers of one config, each of which has read something."""
        other = copy.copy(parts[0])
        other.memories = [
            HeadMemory.joined(memories)
            for memories in zip(*(part.memories or [] for part in parts), strict=True)
        ]
        other._num_columns = max(part._num_columns for part in parts)
        return other

    def reset(self) -> None:
        """Forget everything."""
        self.memories, self._num_columns, self._has_staged = None, 0, False
        self.is_initialized = False

    def _select(self, rows: Tensor) -> None:
        for memory in self.memories or []:
            memory.select_(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows gathered by `beam_idx` `[B]`."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row repeated."""
        self._select(torch.arange(self.num_rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only the given rows (integer indices, or a mask)."""
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def detach_(self) -> None:
        """Detach everything from its graph."""
        for memory in self.memories or []:
            memory.detach_()

    def offload(self) -> None:
        """Move everything to the CPU."""
        for memory in self.memories or []:
            memory.to_("cpu")

    def prefetch(self) -> None:
        """Move everything back to the device it came from."""
        for memory in self.memories or []:
            memory.to_(self.device or "cpu")

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to forget tokens; `crop(0)` does nothing.

        Raises:
            ValueError: `tokens_to_remove` is not 0.
        """
        if tokens_to_remove != 0:
            raise ValueError(
                f"expected crop(0), found crop({tokens_to_remove}): merged tokens cannot be taken out again; "
                "keep a snapshot of the cache from before them (MemoryCache.snapshot)"
            )


class MemoryCache(Cache):
    """The cache of a converted model: its size does not depend on the number of tokens read.

    Args:
        config: what the layers keep. Or use `model.make_cache()`.

    Example:
        >>> config = MemoryConfig.uniform(num_layers=2, num_kv_heads=1, num_slots=8, window=16, chunk_size=8)
        >>> MemoryCache(config)
        MemoryCache(layers=2, rows=0, columns=0, 0 bytes)
    """

    layers: list[MemoryLayer]  # type: ignore[assignment]  # transformers' may be of other kinds

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        super().__init__(layers=[MemoryLayer(config.layer(i)) for i in range(config.num_layers)])

    def __repr__(self) -> str:
        return (
            f"MemoryCache(layers={len(self.layers)}, rows={self.num_rows}, columns={self.get_seq_length()}, "
            f"{self.nbytes:,} bytes)"
        )

    @property
    def num_rows(self) -> int:
        """Rows B; 0 before the first token."""
        return self.layers[0].num_rows

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors kept for all layers and rows."""
        return sum(layer.nbytes for layer in self.layers)

    def snapshot(self) -> MemoryCache:
        """An independent copy, for branching or for going back over rejected tokens."""
        other = MemoryCache(self.config)
        other.layers = [layer.clone() for layer in self.layers]
        return other

    @staticmethod
    def concatenate(caches: Sequence[MemoryCache]) -> MemoryCache:
        """The rows of several caches in one, for rows that join a running batch. The caches do not change.

        A row remembers what it did, wherever the others are. What counts the columns of a row are its
        positions: give later calls `position_ids`, or an `attention_mask` over as many columns as the longest
        cache has, with zeros before shorter rows. `ovq.convert.rows` does the former.

        Args:
            caches: of one model; each has read at least one token.

        Raises:
            ValueError: no caches, an empty one among them, or memories of different sizes or settings.

        Example:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> from ovq.convert import attach
            >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
            >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
            >>> model = attach(model, num_slots=8, window=16, chunk_size=8)
            >>> long, short = model.make_cache(), model.make_cache()
            >>> _ = model(torch.arange(30)[None], past_key_values=long)
            >>> _ = model(torch.tensor([[4]]), past_key_values=short)
            >>> both = MemoryCache.concatenate([long, short])
            >>> places = torch.tensor([[30], [1]])
            >>> _ = model(torch.tensor([[5], [6]]), position_ids=places, past_key_values=both)
            >>> both.num_rows
            2
        """
        rows = [cache.num_rows for cache in caches]
        if not rows or min(rows) == 0:
            raise ValueError(f"expected caches that have read at least one token, found {rows} rows in them")
        if any(cache.config != caches[0].config for cache in caches):
            raise ValueError("expected caches of one model, found memories of different sizes or settings")
        joined = MemoryCache(caches[0].config)
        joined.layers = [
            MemoryLayer.joined(parts) for parts in zip(*(cache.layers for cache in caches), strict=True)
        ]
        return joined

    def detach_(self) -> None:
        """Detach everything from its graph, so that no gradient flows to the tokens read so far."""
        for layer in self.layers:
            layer.detach_()


def layer_of(keys: Tensor) -> MemoryLayer | None:
    """The layer that has handed on these keys; None if no cache has."""
    return getattr(keys, _MARK, None)


def key_factors(exponents: Sequence[Sequence[int]], k: Tensor) -> Tensor:
    """Factors `[Hkv, 1, K]` of keys like `k`, before distances between them are compared.

    Raises:
        ValueError: not as many numbers as keys have.
    """
    if (found := {*map(len, exponents)}) != {k.shape[3]}:
        raise ValueError(f"key_exponents: expected {k.shape[3]} numbers per head, found {sorted(found)}")
    return torch.exp2(torch.tensor(exponents, dtype=torch.float32, device=k.device))[:, None].to(k.dtype)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of `x` `[B, H, T, D]` in the order `[B, T]`."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
