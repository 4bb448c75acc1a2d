"""`Option`, a memory that a head may get, and `trials`, the losses of heads with each of many options.

Every head is tried separately, outside of the model. Memories with equally many slots hold the same content
after the same number of merges, whatever their windows; a shorter window has only merged more. So they share
the slots of the first tokens of a text, which take most of the time. Only the unit of keys (`key_unit`),
measured once per head over the first window, may differ; such heads do not share.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.cache import MemoryLayer
from ovq.convert.captures import Captured
from ovq.convert.compiled import advance
from ovq.convert.config import LayerConfig, MemoryConfig

# Heads, of any layers, that are tried together.
_HEADS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A memory that a head may get: number of slots, and of last tokens kept exactly."""

    num_slots: int
    window: int

    def rows(self, num_sinks: int) -> int:
        """Number of rows, sinks included."""
        return num_sinks + self.num_slots + self.window


@torch.no_grad()
def trials(
    layers: Sequence[Captured],
    options: Sequence[Option],
    num_sinks: int,
    settings: dict[str, Any],
    *,
    wanted: Tensor | None = None,
    progress: Callable[[int], None] = lambda num: None,
) -> Tensor:
    """Rise of the loss per token of each head with each option, `[heads, options]`, float64; 0 if not wanted.

    Args:
        layers: captured tensors of all layers on a text; heads are numbered layer by layer.
        options, num_sinks, settings: those of `Probe`, for all layers.
        wanted: `[heads, options]` bool, which options to try on which heads; None for all.
        progress: called with the number of further trials (a head with an option) that are done.
    """
    heads_of = _Heads(layers, num_sinks, settings)
    total = torch.zeros(heads_of.num, len(options), dtype=torch.float64, device="cpu")
    wanted = torch.ones_like(total, dtype=torch.bool) if wanted is None else wanted
    order = sorted(range(len(options)), key=lambda i: (options[i].num_slots, -options[i].window))
    for _, group in itertools.groupby(order, key=lambda i: options[i].num_slots):
        places = list(group)
        # Heads with the same wanted options of this group are tried together.
        for choice in wanted[:, places].unique(dim=0):
            chosen = [i for i, is_chosen in zip(places, choice.tolist(), strict=True) if is_chosen]
            if not chosen:
                continue
            alike = (wanted[:, places] == choice).all(1).nonzero()[:, 0]
            for heads, is_shared in heads_of.parts(alike, [options[i] for i in chosen]):
                longer: MemoryLayer | None = None
                counted = heads_of.counted(heads)
                for i in chosen:
                    layer = heads_of.learned(heads, options[i], longer)
                    if is_shared and i != chosen[-1]:
                        longer = layer.branch()
                    total[heads, i] = heads_of.losses(counted, layer)
                    progress(len(heads))
    return total


def with_window(longer: MemoryLayer, config: LayerConfig) -> MemoryLayer:
    """The memory of a layer, of one row, as if it had had the shorter window of `config` from the start.

    All heads have the same window. Units of keys must be the same. `longer` does not change.
    """
    layer = longer.branch(config)
    memories = layer.own_()
    k, v = layer.last_tokens(memories[0].filled[0])
    num_kept = 0
    for memory, budget in zip(memories, config.budgets, strict=True):
        # What the shorter window held after the last merge; the later tokens are read once more.
        num_kept = min(k.shape[2], budget.num_exact - budget.chunk_size)
        kept = memory.state.num_merged + num_kept
        pending: dict[str, Any] = {
            name: getattr(memory.state, name)[:, :, : budget.num_exact].contiguous()
            for name in ("pending_keys", "pending_values")
        }
        memory.budget = budget
        memory.hold(dataclasses.replace(memory.state, **pending, **budget.sizes, num_seen=kept))
    advance(memories, k[:, :, num_kept:], v[:, :, num_kept:], [k.shape[2] - num_kept])
    return layer


class _Heads:
    """The captured heads of all layers on a text, and the settings of their memories; see `trials`."""

    def __init__(self, layers: Sequence[Captured], num_sinks: int, settings: dict[str, Any]) -> None:
        self._layers, self._num_sinks = layers, num_sinks
        # By heads, as checking all their numbers takes as long as a short trial.
        self._configs: dict[tuple[int, ...], LayerConfig] = {}
        self._chunk_size, self._merge = settings["chunk_size"], settings["merge"]
        self._per_layer = layers[0].k.shape[1]
        self.num, weights = len(layers) * self._per_layer, settings["value_weight"]
        self._weights = list(itertools.chain(*weights)) if isinstance(weights, list) else [weights] * self.num
        self._exponents, self._uses = (
            None if (table := settings.get(name)) is None else list(itertools.chain(*table))
            for name in ("key_exponents", "token_use")
        )

    def parts(self, heads: Tensor, options: Sequence[Option]) -> list[tuple[Tensor, bool]]:
        """Groups of heads to try together, and whether these options can share their slots.

        The options have equally many slots and descending windows.
        """
        if len(options) == 1:
            return [(part, False) for part in heads.split(_HEADS_AT_ONCE)]
        units = torch.stack(
            [torch.cat([self._units(part, o) for part in heads.split(_HEADS_AT_ONCE)]) for o in options]
        )
        # 0 (no merge yet) does not matter: the next shorter window then measures its own unit.
        is_same = ((units == 0) | (units == units.amax(0))).all(0)
        return [
            (part, flag)
            for flag in (True, False)
            for part in heads[is_same == flag].split(_HEADS_AT_ONCE)
            if len(part)
        ]

    def learned(self, heads: Tensor, option: Option, longer: MemoryLayer | None) -> MemoryLayer:
        """The memory of heads after all tokens before the counted ones.

        It starts from `longer`, with as many slots and a longer window, if given.
        """
        layer = MemoryLayer(self._config(heads, option))
        if longer is not None:
            return with_window(longer, layer.config)
        k, v = self._tokens(heads, slice(self._start))
        layer.learn(k, v)
        return layer

    def counted(self, heads: Tensor) -> dict[str, Tensor]:
        """The tensors of `Captured` for heads, of the tokens whose prediction counts."""
        k, v = self._tokens(heads, slice(self._start, None))
        return {"k": k, "v": v, **{name: self._of(name, heads) for name in ("q", "o", "g")}}

    def losses(self, counted: dict[str, Tensor], layer: MemoryLayer) -> Tensor:
        """Rise of the loss per token `[h]` of heads with the memory `layer`; it reads the counted tokens."""
        q, k, v, o, g = (counted[name] for name in "qkvog")
        change = layer.attend(q, k, v, None).float().sub_(o).mul_(g).sum(-1)
        # Query heads that share a key/value head change together.
        change = change.unflatten(1, (k.shape[1], -1)).sum(2)
        return change.double().square().sum((0, 2)).cpu() / 2 / self._layers[0].num_targets

    @property
    def _start(self) -> int:
        return self._layers[0].k.shape[2] - self._layers[0].q.shape[2]

    def _tokens(self, heads: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        return self._of("k", heads, part), self._of("v", heads, part)

    def _of(self, name: str, heads: Tensor, part: slice = slice(None)) -> Tensor:
        """Tokens `part` of a tensor of `Captured`, for these key/value heads (or their query heads)."""
        found = []
        for head in heads.tolist():
            layer, own = divmod(head, self._per_layer)
            tensor = getattr(self._layers[layer], name)
            group = tensor.shape[1] // self._per_layer
            found.append(tensor[:, own * group : (own + 1) * group, part])
        return torch.cat(found, 1)

    def _units(self, heads: Tensor, option: Option) -> Tensor:
        """`key_unit` of each head, set by the first merge; 0 without one."""
        layer = MemoryLayer(self._config(heads, option))
        layer.learn(*self._tokens(heads, slice(self._num_sinks + option.window)))
        units = torch.zeros(len(heads), dtype=torch.float64, device="cpu")
        for memory in layer.memories or []:
            assert memory.state.key_unit is not None
            units[list(memory.budget.heads)] = memory.state.key_unit[0].double().cpu()
        return units

    def _config(self, heads: Tensor, option: Option) -> LayerConfig:
        key = tuple(heads.tolist())
        if key not in self._configs:
            self._configs[key] = MemoryConfig(
                num_slots=[[1] * len(key)],
                window=[[self._chunk_size] * len(key)],
                num_sinks=self._num_sinks,
                chunk_size=self._chunk_size,
                merge=self._merge,
                value_weight=[[self._weights[h] for h in key]],
                key_exponents=None if self._exponents is None else [[self._exponents[h] for h in key]],
                token_use=None if self._uses is None else [[self._uses[h] for h in key]],
            ).layer(0)
        config = self._configs[key]
        budgets = tuple(
            dataclasses.replace(budget, num_slots=option.num_slots, window=option.window)
            for budget in config.budgets
        )
        return dataclasses.replace(config, budgets=budgets)
