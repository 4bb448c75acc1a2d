"""`MemoryCache`: the cache of a converted model, of constant size, for transformers.

transformers calls `Cache.update` before the attention function. A layer here only passes the new keys and
values on, marked as its own; the attention function finds the memory by that mark, then reads and updates it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.compiled import advance
from ovq.convert.config import Budget, LayerConfig, MemoryConfig
from ovq.convert.memory import HeadMemory
from ovq.convert.pieces import in_pieces
from ovq.convert.reading import Observer
from ovq.hf.cache import MOST_CROPPED, OVQCacheLayer, StateCache, not_croppable
from ovq.layers.memory import Memory, StateSpec
from ovq.ops import OVQState
from ovq.ops.state import state_tensors, tensors_of

#: Attribute of passed keys that holds their `MemoryLayer`.
MARK = "_ovq_memory_layer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadMemories(Memory):
    """Handles states that are lists of `HeadMemory`, one per group of heads with equal budgets.

    A layer that owns such a list changes its memories in place, see `MemoryLayer.branch`.

    Attributes:
        observer: makes the observer of each new memory, see `HeadMemory`.
        num_tokens: most tokens that a new memory will read, see `HeadMemory`.
    """

    kind: str = "sinks, windows and slots"
    config: LayerConfig = dataclasses.field(compare=False)
    observer: Callable[[Budget], Observer] | None = dataclasses.field(default=None, compare=False)
    num_tokens: int | None = dataclasses.field(default=None, compare=False)

    def empty(self, k: Tensor, v: Tensor) -> list[HeadMemory]:
        """Empty memories for keys like `k` `[B, Hkv, T, K]` and values like `v` (sizes, dtype, device)."""
        made = []
        for budget in self.config.budgets:
            own_k, own_v = (x[:, : len(budget.heads)] for x in (k, v))
            made.append(HeadMemory.empty(budget, own_k, own_v, self._use(budget), self.num_tokens))
            made[-1].observer = None if self.observer is None else self.observer(budget)
        return made

    def _use(self, budget: Budget) -> Tensor | None:
        use = self.config.tensor("token_use", "cpu")
        return None if use is None else use[list(budget.heads)]

    def tensors(self, state: list[HeadMemory]) -> dict[str, Tensor]:
        """See `Memory.tensors`."""
        return _numbered(tensors_of(memory.state) for memory in state)

    def saved(self, state: list[HeadMemory]) -> dict[str, Tensor]:
        """See `Memory.saved`."""
        return _numbered(state_tensors(memory.state) for memory in state)

    def spec(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> StateSpec:
        """Shapes and dtypes of one row's tensors; the sizes K and V are taken from `tensors`."""
        found = [tensors.get(f"0.pending_{name}") for name in ("keys", "values")]
        # Empty ones could claim any size.
        sizes = [0 if x is None or x.dim() != 4 or not x.numel() else x.shape[3] for x in found]
        heads = self.config.num_kv_heads
        k, v = (torch.empty(1, heads, 0, size, dtype=dtype, device="meta") for size in sizes)
        return {name: (tuple(t.shape[1:]), t.dtype) for name, t in self.tensors(self.empty(k, v)).items()}

    def restored(self, tensors: Mapping[str, Tensor], device: torch.device | str | None) -> list[HeadMemory]:
        """See `Memory.restored`."""
        found = []
        for budget, own in zip(self.config.budgets, self.by_group(tensors), strict=True):
            moved: dict[str, Any] = {
                name: x.to("cpu" if name == "num_seen" else device).contiguous() for name, x in own.items()
            }
            use = self._use(budget) if "token_use" in own else None
            found.append(HeadMemory(budget, OVQState(**moved, **budget.sizes), use))
        return found

    def by_group(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The tensors of each group of heads from the result of `tensors`, by their names in `OVQState`."""
        prefixes = [f"{i}." for i in range(len(self.config.budgets))]
        return [{n.removeprefix(p): t for n, t in tensors.items() if n.startswith(p)} for p in prefixes]

    def select(self, state: list[HeadMemory], rows: Tensor) -> list[HeadMemory]:
        """See `Memory.select`."""
        return [memory.with_state(memory.state.select(rows)) for memory in state]

    def to(self, state: list[HeadMemory], device: torch.device | str) -> list[HeadMemory]:
        """See `Memory.to`."""
        return [memory.to(device) for memory in state]

    def detach(self, state: list[HeadMemory]) -> list[HeadMemory]:
        """See `Memory.detach`."""
        return [memory.with_state(memory.state.detach()) for memory in state]

    def concatenate(self, states: Sequence[list[HeadMemory]], num_missing: Sequence[int]) -> list[HeadMemory]:
        """See `Memory.concatenate`. Padding does not matter: memories hold no padding columns."""
        return [
            first.with_state(OVQState.concatenate([memory.state for memory in (first, *others)]))
            for first, *others in zip(*states, strict=True)
        ]

    def without_columns(self, state: list[HeadMemory], num_dropped: int, num_left: int) -> list[HeadMemory]:
        """See `Memory.without_columns`."""
        return state


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """What a layer keeps so that its last tokens can be cropped.

    Attributes:
        num_columns: columns read before recording.
        before: copies of the memories before the first recorded call that merged or re-positioned.
        tokens: keys and values `[1, Hkv, T, D]` of the real tokens from that call on; None if there was none.
        earlier: what was recorded up to `num_columns`, once there are too many tokens for one record.
    """

    num_columns: int
    before: Sequence[HeadMemory] = ()
    tokens: tuple[Tensor, Tensor] | None = None
    earlier: Recorded | None = None


class MemoryLayer(OVQCacheLayer):
    """The memory of one layer of a converted model, which will read at most `num_tokens` per row."""

    memory: HeadMemories

    def __init__(self, config: LayerConfig, num_tokens: int | None = None) -> None:
        super().__init__(HeadMemories(config=config, num_tokens=num_tokens))
        # Whether keys were passed on that the attention function has not received yet.
        self.has_staged = False
        # Whether a copy of this layer, perhaps in another process, shares the memories.
        self._is_shared = False
        self._recorded = Recorded(0)

    @property
    def config(self) -> LayerConfig:
        """Sizes and settings of the layer."""
        return self.memory.config

    @property
    def memories(self) -> list[HeadMemory] | None:
        """The memory of each group of heads with equal budgets; None before the first token."""
        return self.state

    @property
    def slot_states(self) -> list[OVQState]:
        """See `OVQCacheLayer.slot_states`."""
        return [memory.state for memory in self.state or []]

    @property
    def num_rows(self) -> int:
        """Rows B; 0 before the first token."""
        return 0 if self.state is None else len(self.state[0].filled)

    def branch(self, config: LayerConfig | None = None) -> MemoryLayer:
        """An independent layer with the same content, optionally with another config (copy on write)."""
        other = copy.copy(self)
        if config is not None:
            other.memory = HeadMemories(config=config)
        return other

    def own_(self) -> list[HeadMemory]:
        """The memories, copied first if another layer shares them."""
        if self._is_shared:
            self.state, self._is_shared = [memory.clone() for memory in self.state], False
        return self.state

    def __getstate__(self) -> dict[str, Any]:
        """See `LayerCache`. The copy has the same memories, or in another process the same shared memory."""
        self._is_shared = self.state is not None
        return super().__getstate__()

    # What is recorded is of the rows and columns that there were.
    def set_state(self, state: Any, num_new: int) -> None:
        """See `LayerCache.set_state`."""
        super().set_state(state, num_new)
        self._recorded = Recorded(self.num_columns)

    def drop_columns(self, num_dropped: int) -> None:
        """See `LayerCache.drop_columns`."""
        super().drop_columns(num_dropped)
        self._recorded = Recorded(self.num_columns)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in their order."""
        super().batch_select_indices(indices)
        # The selected rows are copies.
        self._is_shared, self._recorded = False, Recorded(self.num_columns)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.has_staged = self._is_shared = False
        self._recorded = Recorded(0)

    def activate_past_recording(self, recurrent_states_to_keep: int | None = None) -> None:
        """See `OVQCacheLayer.activate_past_recording`."""
        self.record_past, self._recorded = True, Recorded(self.num_columns)

    def can_record(self, num_new: int) -> bool:
        """Whether a kernel may read `num_new` tokens: they can be cropped later, or nothing is recorded."""
        if not self.record_past:
            return True
        # `record_read` looks for the tokens among the last ones of the window.
        kept = min(memory.budget.window - memory.budget.chunk_size for memory in self.state)
        is_found = self.num_rows == 1 and num_new <= kept
        return self._recorded.tokens is None and (is_found or not self._changes_after(num_new))

    def copies_before(self, num_new: int) -> list[HeadMemory]:
        """Copies of the memories if cropping the next tokens will need them, else an empty list."""
        is_needed = self.record_past and self._changes_after(num_new)
        return [memory.clone() for memory in self.state] if is_needed else []

    def record_read(self, before: list[HeadMemory], num_new: int) -> None:
        """Record the copies `before` with the last `num_new` tokens, which a kernel has read since."""
        if not before:
            return
        k, v = self.last_tokens(num_new)
        if (factors := self.config.key_factors(k)) is not None:
            k = k / factors
        self._recorded = dataclasses.replace(self._recorded, before=before, tokens=(k, v))

    def last_tokens(self, num: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[1, Hkv, num, D]` of the last exact tokens of one row, as memories hold them."""
        heads = [head for memory in self.state for head in memory.budget.heads]
        order = torch.tensor(heads, device="cpu").argsort()
        k, v = (
            torch.cat([getattr(x.state, name)[:, :, x.filled[0] - num : x.filled[0]] for x in self.state], 1)
            for name in ("pending_keys", "pending_values")
        )
        return k[:, order], v[:, order]

    def _changes_after(self, num_new: int) -> bool:
        """Whether `num_new` tokens cause a merge or re-positioning, which `HeadMemory.drop_` cannot undo."""
        return num_new >= self.until_reposition() or any(
            max(memory.filled) + num_new >= memory.budget.num_exact for memory in self.state
        )

    def _record(self, k: Tensor, v: Tensor) -> None:
        """Keep what is needed to crop the real tokens `[1, Hkv, T, K]` of the next columns."""
        recorded = self._recorded
        if recorded.tokens is not None:
            keys, values = recorded.tokens
            if keys.shape[2] + k.shape[2] <= MOST_CROPPED:
                tokens = torch.cat([keys, k], 2), torch.cat([values, v], 2)
                self._recorded = dataclasses.replace(recorded, tokens=tokens)
                return
            earlier = dataclasses.replace(recorded, earlier=None)
            recorded = self._recorded = Recorded(self.num_columns, earlier=earlier)
        if self._changes_after(k.shape[2]):
            before = [memory.clone() for memory in self.state]
            self._recorded = dataclasses.replace(recorded, before=before, tokens=(k, v))

    @property
    def num_recorded(self) -> int:
        """Number of columns that can be cropped."""
        num_before = (self._recorded.earlier or self._recorded).num_columns
        return self.num_columns - num_before if self.record_past and self.num_rows == 1 else 0

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns, of which there are at most `num_recorded`."""
        recorded, num_left = self._recorded, self.num_columns + tokens_to_remove
        num_removed = -tokens_to_remove
        if recorded.earlier is not None and num_left < recorded.num_columns:
            num_removed, recorded = recorded.num_columns - num_left, recorded.earlier
        if num_removed and recorded.tokens is not None:
            for memory, before in zip(self.own_(), recorded.before, strict=True):
                memory.put_back_(before)
            num_kept = recorded.tokens[0].shape[2] - num_removed
            if num_kept > 0:
                self.learn(*(x[:, :, :num_kept] for x in recorded.tokens))
            num_removed = max(0, -num_kept)
        for memory in self.own_() if num_removed else []:
            memory.drop_(num_removed)
        self.num_columns, self._recorded = num_left, Recorded(num_left)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass keys and values on to the attention function, marked as belonging to this layer.

        Raises:
            ValueError: the keys passed on before have not reached the attention function of this package.
        """
        if self.has_staged:
            raise ValueError(
                "expected a model that passes its keys from Cache.update to the attention function of its "
                "config, found one that does not: it cannot be converted"
            )
        self.has_staged = True
        key_states = key_states.view_as(key_states)
        setattr(key_states, MARK, self)
        return key_states, value_states

    def learn(self, k: Tensor, v: Tensor) -> None:
        """`attend` for keys `[B, Hkv, T, K]` and values `[B, Hkv, T, V]` of real tokens, without queries."""
        self._check(k, v)
        self._read(None, k, v, [k.shape[2]] * len(k))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention outputs `[B, H, T, V]` of new tokens, which are added to the memory.

        Args:
            q: `[B, H, T, K]` queries, scaled. k: `[B, Hkv, T, K]`. v: `[B, Hkv, T, V]`.
            mask: `[B, T]`, which tokens are real; None for all.

        Raises:
            ValueError: heads, rows or sizes other than those of the memory.
        """
        self._check(k, v, q)
        if self.record_past and (cut := q.shape[2] - MOST_CROPPED) > 0:
            # Only the last tokens of a long prompt are recorded.
            masks = [None, None] if mask is None else [mask[:, :cut], mask[:, cut:]]
            self.record_past = False
            first = self.attend(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut], masks[0])
            self.activate_past_recording()
            last = self.attend(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], masks[1])
            return torch.cat([first, last], 2)
        self.begin(k, v)
        lengths = [q.shape[2]] * len(q) if mask is None else mask.sum(-1).tolist()
        self.has_padding |= min(lengths) < q.shape[2]
        order = None
        if mask is not None:
            # Real tokens first; without padding, this changes nothing.
            order = (~mask).byte().argsort(dim=-1, stable=True)
            q, k, v = (_take(x, order) for x in (q, k, v))
        if self.record_past and len(k) == 1:
            self._record(k[:, :, : lengths[0]], v[:, :, : lengths[0]])
        o = self._read(q, k, v, lengths)
        assert o is not None
        return o if order is None else _take(o, order.argsort(-1))

    def _read(self, q: Tensor | None, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor | None:
        """`attend` for checked tokens, of which each row's first `lengths` are real; None without queries."""
        memories = self.begin(k, v)
        self.num_columns += k.shape[2]
        if (factors := self.config.key_factors(k)) is not None:
            # The factors are powers of 2, so scores stay bit-identical.
            q = q if q is None else q / factors.repeat_interleave(q.shape[1] // k.shape[1], 0)
            k = k * factors
        temperature, bias = (self.config.tensor(f"slot_{x}", k.device) for x in ("temperature", "bias"))

        def read(now: Sequence[int], k: Tensor, v: Tensor, q: Tensor | None = None) -> Tensor | None:
            o = advance(memories, k, v, now, q=q, temperature=temperature, bias=bias)
            self.reposition(now)
            return o

        reach = self.config.reach
        if reach is None or max(lengths) < self.until_reposition():
            return read(lengths, k, v, q)

        def room(row: int, done: int) -> int:
            return reach.until_reposition(memories[0].num_read(row) + done)

        return in_pieces(read, lengths, room, k, v, q)

    def _check(self, k: Tensor, v: Tensor, q: Tensor | None = None) -> None:
        """Raise ValueError unless heads, rows and sizes of the tokens are those of the memory.

        Otherwise compiled kernels would read and write out of bounds.
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
        for wrong in self.config.misfits(None if q is None else q.shape[1], k.shape[3], v.shape[3]):
            raise ValueError(wrong)
        if self.state is None:
            return
        kept = self.state[0].state
        expected = self.num_rows, kept.pending_keys.shape[3], kept.pending_values.shape[3]
        if (found := (k.shape[0], k.shape[3], v.shape[3])) != expected:
            raise ValueError(
                f"expected keys and values of as many rows and components as the cache has, {expected}, "
                f"found {found}: the cache is of another model or another batch"
            )

    def begin(self, k: Tensor, v: Tensor) -> list[HeadMemory]:
        """The memories, created on first use with the sizes of `k` and `v`."""
        if self.state is None:
            self.set_state(self.memory.empty(k, v), 0)
        return self.own_()

    def until_reposition(self) -> float:
        """Fewest tokens until a row is re-positioned; inf if that never happens."""
        reach = self.config.reach
        if reach is None or self.state is None:
            return math.inf
        return min(reach.until_reposition(self.state[0].num_read(row)) for row in range(self.num_rows))

    def reposition(self, now: Sequence[int]) -> None:
        """Re-position sinks and slots that are too far away, in rows that have just read `now` tokens."""
        reach, first = self.config.reach, self.state[0]
        if reach is None:
            return
        rows = [row for row, num in enumerate(now) if num and reach.is_reposition_due(first.num_read(row))]
        if not rows:
            return
        factors, num = self.config.key_factors(first.state.key_unit), len(reach.frequencies)
        for memory in self.state:
            own = None if factors is None else factors[list(memory.budget.heads), 0]
            ratio = None if own is None else own[:, :num] / own[:, num : 2 * num]
            memory.reposition_(rows, reach, ratio)


class MemoryCache(StateCache):
    """The cache of a converted model; its size does not depend on the number of tokens read.

    Args:
        config: sizes and settings of the layers. `model.make_cache()` passes the model's.

    Example:
        >>> config = MemoryConfig.uniform(num_layers=2, num_kv_heads=1, num_slots=8, window=16, chunk_size=8)
        >>> MemoryCache(config)
        MemoryCache(layers=2, rows=0, columns=0, 0 bytes)
    """

    layers: list[MemoryLayer]  # type: ignore[assignment]  # other models have layers of other kinds

    def __init__(self, config: MemoryConfig) -> None:
        self.config = config
        super().__init__(layers=[MemoryLayer(config.layer(i)) for i in range(config.num_layers)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` of the tokens recorded since the last crop.

        Raises:
            ValueError: a layer has not recorded that many, or not one row, or a number above 0. No layer is
                changed then.
        """
        # Earlier versions of transformers pass a tensor: `+=` on the column count would change it in place.
        tokens_to_remove = int(tokens_to_remove)
        num_recorded = min(layer.num_recorded for layer in self.layers)
        if self.reset_beyond(tokens_to_remove, num_recorded):
            return
        if not -num_recorded <= tokens_to_remove <= 0:
            raise not_croppable(tokens_to_remove, num_recorded)
        super().crop(tokens_to_remove)

    @classmethod
    def concatenate(cls, caches: Sequence[MemoryCache], config: Any = None) -> MemoryCache:
        """One cache with the rows of several, see `StateCache.concatenate`.

        Raises:
            ValueError: as there; also for memories of different sizes or settings.

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
        if any(cache.config != caches[0].config for cache in caches):
            raise ValueError("expected caches of one model, found memories of different sizes or settings")
        return super().concatenate(caches)


def _numbered(groups: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all groups of heads by names that begin with the group's number."""
    return {f"{i}.{name}": x for i, own in enumerate(groups) for name, x in own.items()}


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of `x` `[B, H, T, D]` gathered by the indices `order` `[B, T]`."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
