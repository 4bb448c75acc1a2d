"""`Option`, a memory that a head may get, and `trials`: what heads lose by each of many.

Every head is tried by itself, outside of the model. Memories of equally many slots hold the same in them
after as many merges, however long their windows are: the shorter one has only merged more. So these share
what they learn of the first tokens of a text, which takes most of the time. It is only the unit of keys,
measured once per head over the first window, that may differ; such heads learn anew.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.cache import MemoryLayer
from ovq.convert.captures import Captured
from ovq.convert.config import LayerConfig, MemoryConfig

# Heads, of all layers, that are tried side by side.
_HEADS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A memory that a head may get: slots, and last tokens kept exactly."""

    num_slots: int
    window: int

    def rows(self, num_sinks: int) -> int:
        """Rows that it takes."""
        return num_sinks + self.num_slots + self.window


@torch.no_grad()
def trials(
    captured: Captured, options: Sequence[Option], num_sinks: int, settings: dict[str, Any]
) -> Iterator[tuple[int, Tensor]]:
    """The place of each option, in some order, with the rise of the loss per token `[Hkv]` if heads had it.

    Args:
        captured: heads on a text.
        options: the memories.
        num_sinks: first tokens kept exactly in all of them.
        settings: those of `Probe`, of all layers; there may be more heads in `captured` than in one.
    """
    heads_of = _Heads(captured, num_sinks, settings)
    order = sorted(range(len(options)), key=lambda i: (options[i].num_slots, -options[i].window))
    for _, group in itertools.groupby(order, key=lambda i: options[i].num_slots):
        places = list(group)
        parts = heads_of.parts([options[i] for i in places])
        learned: list[MemoryLayer | None] = [None] * len(parts)
        for i in places:
            total = torch.zeros(captured.k.shape[1], dtype=torch.float64)
            for j, (heads, is_shared) in enumerate(parts):
                layer = heads_of.learned(heads, options[i], learned[j])
                if is_shared and i != places[-1]:
                    learned[j] = layer.branch()
                total[heads] = heads_of.losses(heads, layer)
            yield i, total


def with_window(longer: MemoryLayer, config: LayerConfig) -> MemoryLayer:
    """The memory of a layer as it would be if its windows had been shorter all the time.

    Args:
        longer: what the layer has learned, of one row; it does not change.
        config: that of `longer`, but for the windows. Units of keys must be the same.
    """
    layer = longer.branch(config)
    for memory, budget in zip(layer.own_(), config.budgets, strict=True):
        recent = [x[:, :, : memory.filled[0]] for x in (memory.recent_keys, memory.recent_values)]
        # Sinks and last tokens are read once more, now with fewer places.
        memory.budget, memory.filled = budget, [0]
        memory.recent_keys, memory.recent_values = (
            x.new_zeros(*x.shape[:2], budget.num_exact, x.shape[3]) for x in recent
        )
        memory.learn(*recent)
    return layer


class _Heads:
    """The heads of all layers on a text, and what their memories are made with; see `trials`."""

    def __init__(self, captured: Captured, num_sinks: int, settings: dict[str, Any]) -> None:
        self._captured, self._num_sinks = captured, num_sinks
        self._chunk_size, self._merge = settings["chunk_size"], settings["merge"]
        num, weights = captured.k.shape[1], settings["value_weight"]
        self._weights = list(itertools.chain(*weights)) if isinstance(weights, list) else [weights] * num
        self._exponents, self._uses = (
            None if (table := settings.get(name)) is None else list(itertools.chain(*table))
            for name in ("key_exponents", "token_use")
        )

    def parts(self, options: Sequence[Option]) -> list[tuple[Tensor, bool]]:
        """Heads that are tried side by side, and whether what they learn is the same for these options, of
        equally many slots and windows one shorter than the other.
        """
        # As in one layer of many heads, those of equal weights side by side.
        heads = torch.tensor(self._weights).argsort(stable=True)
        if len(options) == 1:
            return [(part, False) for part in heads.split(_HEADS_AT_ONCE)]
        units = torch.stack(
            [torch.cat([self._units(part, o) for part in heads.split(_HEADS_AT_ONCE)]) for o in options]
        )
        # Where none was found, the next shorter window finds its own.
        is_same = ((units == 0) | (units == units.amax(0))).all(0)
        return [
            (part, flag)
            for flag in (True, False)
            for part in heads[is_same == flag].split(_HEADS_AT_ONCE)
            if len(part)
        ]

    def learned(self, heads: Tensor, option: Option, longer: MemoryLayer | None) -> MemoryLayer:
        """The memory of heads that have read all tokens before those whose prediction counts.

        Args:
            heads: which ones.
            option: its sizes.
            longer: the memory of as many slots and a longer window, if they share what they learn.
        """
        layer = MemoryLayer(self._config(heads, option))
        if longer is not None:
            return with_window(longer, layer.config)
        k, v = self._tokens(heads, slice(self._start))
        layer.learn(k, v)
        return layer

    def losses(self, heads: Tensor, layer: MemoryLayer) -> Tensor:
        """Rise of the loss per token `[h]` if heads have the memory `layer`, which reads on."""
        captured = self._captured
        per_head = captured.q.shape[1] // captured.k.shape[1]
        own = (heads[:, None] * per_head + torch.arange(per_head)).flatten().to(captured.q.device)
        k, v = self._tokens(heads, slice(self._start, None))
        o = layer.attend(captured.q[:, own], k, v, None)
        change = ((o - captured.o[:, own]).float() * captured.g[:, own].float()).sum(-1)
        # Query heads that share keys change together.
        change = change.unflatten(1, (len(heads), -1)).sum(2)
        return change.double().square().sum((0, 2)).cpu() / 2 / captured.num_targets

    @property
    def _start(self) -> int:
        return self._captured.k.shape[2] - self._captured.q.shape[2]

    def _tokens(self, heads: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        index = heads.to(self._captured.k.device)
        return self._captured.k[:, index, part], self._captured.v[:, index, part]

    def _units(self, heads: Tensor, option: Option) -> Tensor:
        """The unit of keys of each head, which the first merge finds; 0 if there is none."""
        layer = MemoryLayer(self._config(heads, option))
        layer.learn(*self._tokens(heads, slice(self._num_sinks + option.window)))
        units = torch.zeros(len(heads), dtype=torch.float64)
        for memory in layer.memories or []:
            units[list(memory.budget.heads)] = memory.key_unit[0].double().cpu()
        return units

    def _config(self, heads: Tensor, option: Option) -> LayerConfig:
        config = MemoryConfig(
            num_slots=[[option.num_slots] * len(heads)],
            window=[[option.window] * len(heads)],
            num_sinks=self._num_sinks,
            chunk_size=self._chunk_size,
            merge=self._merge,
            value_weight=[[self._weights[h] for h in heads]],
            key_exponents=None if self._exponents is None else [[self._exponents[h] for h in heads]],
            token_use=None if self._uses is None else [[self._uses[h] for h in heads]],
        )
        return config.layer(0)
