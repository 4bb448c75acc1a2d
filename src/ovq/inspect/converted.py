"""`converted_memories`: what the layers of a converted model keep of a text, recorded by observers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ovq.convert.cache import MemoryLayer
from ovq.convert.config import Budget
from ovq.hf.cache import CACHE_KEY
from ovq.inspect.memory import DROPPED, EXACT, LayerMemory, Reads, kept_share, moves_of, reads_of
from ovq.ops import OVQState


@torch.no_grad()
def converted_memories(
    model: Any, ids: Tensor, *, num_reads: int, progress: Callable[[int], None] | None = None
) -> list[LayerMemory]:
    """Run a converted model on a text in one pass; returns what each of its layers kept and read.

    Args:
        model: A model from `ovq.convert.attach`.
        ids: `[1, T]` token ids.
        num_reads: k, number of largest attention weights to keep per query.
        progress: Called with the number of tokens done, summed over the layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ovq.convert import attach
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
        >>> model = attach(model, num_slots=8, window=16, chunk_size=8)
        >>> [memory] = converted_memories(model, torch.arange(60)[None] % 32, num_reads=4)
        >>> memory.num_exact, memory.num_chunks(0), int(memory.final_slots.max())
        ((20, 20), 6, 7)
    """
    cache, num_tokens = model.make_cache(), ids.shape[1]
    for number, layer in enumerate(cache.layers):

        def observe(budget: Budget, before: int = number * num_tokens) -> _HeadObserver:
            # One of the layer's observers reports.
            report = None if progress is None or 0 not in budget.heads else lambda n: progress(before + n)
            return _HeadObserver(budget, num_tokens, num_reads, report)

        layer.memory = dataclasses.replace(layer.memory, observer=observe)
    model.base_model(ids, **{CACHE_KEY: cache})
    return [_joined(number, layer) for number, layer in enumerate(cache.layers)]


class _HeadObserver:
    """Records what the heads of one budget keep and read while a text is read; see `converted_memories`."""

    def __init__(
        self, budget: Budget, num_tokens: int, num_reads: int, progress: Callable[[int], None] | None
    ) -> None:
        self.budget = budget
        self.places = np.full((len(budget.heads), num_tokens), EXACT, dtype=np.int32)
        self.first_places = self.places.copy()
        self.moves = [np.zeros((0, 4), dtype=np.int32)]
        self.reads: list[Reads] = []
        self.values: list[Tensor] = []
        self._num_reads, self._progress = num_reads, progress
        self._num_read = self._num_chunks = 0

    def on_attend(self, state: OVQState, num_slots: int, probs: Tensor) -> None:
        """See `Observer`."""
        num_exact, num_new = probs.shape[4] - num_slots, probs.shape[3]
        num_merged = self._num_chunks * self.budget.chunk_size
        positions = torch.arange(num_exact, device=probs.device)
        positions[self.budget.num_sinks :] += num_merged
        weights = torch.cat([probs[0, ..., num_exact:], probs[0, ..., :num_exact]], -1).flatten(0, 1)
        is_single = state.count[0, :, :num_slots] == 1 if num_slots else None
        self.reads.append(reads_of(weights, positions, self._num_reads, is_single=is_single))
        own = self._num_read - num_merged
        self.values.append(state.pending_values[0, :, own : own + num_new].clone())
        self._num_read += num_new
        if self._progress is not None:
            self._progress(self._num_read)

    def on_merge(self, homes: Tensor | None) -> None:
        """See `Observer`."""
        size = self.budget.chunk_size
        start = self.budget.num_sinks + self._num_chunks * size
        chunk = slice(start, start + size)
        if homes is None:
            self.places[:, chunk] = self.first_places[:, chunk] = DROPPED
        else:
            to, new = (
                x.cpu().numpy().astype(np.int32) for x in homes[0].split([homes.shape[2] - size, size], 1)
            )
            head, token = np.nonzero(self.places >= 0)
            self.moves.append(moves_of(to, self._num_chunks))
            self.places[head, token] = to[head, self.places[head, token]]
            self.places[:, chunk] = self.first_places[:, chunk] = new
        self._num_chunks += 1


def _joined(number: int, layer: MemoryLayer) -> LayerMemory:
    """The memory of a layer, from the observers of its groups of heads."""
    assert layer.memories is not None
    observers = [cast("_HeadObserver", memory.observer) for memory in layer.memories]
    budgets = {head: observer.budget for observer in observers for head in observer.budget.heads}
    moves, kept, reads = [], [], []
    for memory, observer in zip(layer.memories, observers, strict=True):
        own = np.concatenate(observer.moves)
        own[:, 1] = np.array(observer.budget.heads)[own[:, 1]]
        moves.append(own)
        values = torch.cat(observer.values, 1)
        kept.append(kept_share(values, memory.state.values[0], memory.state.count[0] == 1, observer.places))
        reads.append(Reads.joined(observer.reads))
    order = np.argsort(list(budgets))
    per_head = len(reads[0].entries) // len(observers[0].budget.heads)
    of_queries = (order[:, None] * per_head + np.arange(per_head)).flatten()
    return LayerMemory(
        layer=number,
        num_slots=tuple(budgets[head].num_slots for head in sorted(budgets)),
        num_exact=tuple(budgets[head].num_exact for head in sorted(budgets)),
        num_sinks=budgets[0].num_sinks,
        chunk_size=budgets[0].chunk_size,
        slots=np.concatenate([x.first_places for x in observers])[order],
        moves=np.concatenate(moves),
        final_slots=np.concatenate([x.places for x in observers])[order],
        kept=np.concatenate(kept)[order],
        **{name: np.concatenate([getattr(x, name) for x in reads])[of_queries] for name in Reads._fields},
    )
