"""Memories of a cache in the form that the whole-layer kernels take (`HeadsStep`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.cache import MemoryCache, MemoryLayer
from ovq.convert.config import LayerConfig
from ovq.convert.memory import HeadMemory
from ovq.ops.backends.cpu.layer import HeadsLayer, HeadsStep
from ovq.ops.backends.cpu.memory import HeadGroup

#: Most tokens, over all rows, that count as decoding; more are a prompt. Mirrored by `FEW_ROWS` of step.h.
MOST_ROWS = 32

# Prompt tokens per call, over all rows: few enough that activations and weights fit into the CPU's caches.
_PIECE = 512


class CacheStep:
    """The kernel arguments for the memories of a cache, reused from one decoding step to the next."""

    def __init__(self, cache: MemoryCache, layers: Sequence[HeadsLayer]) -> None:
        self._memories = [memory for layer in cache.layers for memory in layer.own_()]
        self._layers = cache.layers
        self._configs = [layer.config for layer in cache.layers]
        self._tensors = [memory.kernel_tensors() for memory in self._memories]
        groups = [_groups(layer, of, 1) for layer, of in zip(cache.layers, layers, strict=True)]
        self._groups = [group for own in groups for group in own]
        self._merged: list[list[int]] = [[] for _ in self._groups]
        factors = _factors(self._configs)
        self._step = HeadsStep(layers, groups, factors, cache.num_rows, MOST_ROWS)
        self._num_tokens = 1

    def is_current(self, cache: MemoryCache) -> bool:
        """Whether the cache still has the same memories, and these the same tensors."""
        memories = [memory for layer in cache.layers for memory in layer.state]
        if len(memories) != len(self._memories):
            return False
        for layer, config in zip(cache.layers, self._configs, strict=True):
            if layer.config is not config:
                return False
        for memory, own, tensors in zip(memories, self._memories, self._tensors, strict=True):
            memory.own_()
            if memory is not own:
                return False
            fields = vars(memory.state)
            for name, x in tensors.items():
                if fields[name] is not x:
                    return False
        return True

    def run(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Outputs `[B, T, D]` of the layers, with rotary `cos`, `sin` `[B or 1, T, K]`; updates memories."""
        rows, num, _ = x.shape
        before = [layer.copies_before(num) for layer in self._layers]
        if num != self._num_tokens:
            self._num_tokens = num
            for group in self._groups:
                group.put("length", [num] * rows)
        for i, (memory, group) in enumerate(zip(self._memories, self._groups, strict=True)):
            group.put("filled", memory.filled)
            if memory.num_merged != self._merged[i]:
                self._merged[i] = list(memory.num_merged)
                group.put("num_merged", memory.num_merged)
                group.put("schedule", [num for sizes in _now_and_next(memory) for num in sizes])
        _put_angles(self._step, cos, sin, rows, num)
        y = self._step.run(x)
        # All have read equally many tokens.
        num_seen = self._memories[0].state.num_seen + num
        for memory in self._memories:
            memory.count_tokens([num] * rows, num_seen)
        for layer, copies in zip(self._layers, before, strict=True):
            layer.num_columns += num
            layer.record_read(copies, num)
        return y


def read_pieces(
    cache: MemoryCache, layers: Sequence[HeadsLayer], x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
) -> Tensor:
    """`CacheStep.run` for any number of tokens `[B, T, D]` in float32, in pieces.

    All layers of the cache must have read equally many tokens, or none. It keeps keys in `dtype`.
    """
    rows, num, _ = x.shape
    is_rough = rows * num > MOST_ROWS and layers[0].q.factors is not None
    factors = _factors([layer.config for layer in cache.layers])
    like = torch.empty((), dtype=dtype, device="cpu")
    for layer, of in zip(cache.layers, layers, strict=True):
        own = like.expand(rows, layer.config.num_kv_heads, 1, of.head_dim)
        layer.begin(own, own)
    parts: list[Tensor] = []
    for pieces in _pieces(cache, rows, num):
        steps, lengths = [], []
        for part in pieces:
            lengths = [part.stop - part.start] * rows
            groups = [_groups(layer, of, lengths[0]) for layer, of in zip(cache.layers, layers, strict=True)]
            step = HeadsStep(layers, groups, factors, rows, rows * lengths[0], is_rough=is_rough)
            _put_angles(step, cos[:, part], sin[:, part], rows, lengths[0])
            steps.append(step)
            for layer in cache.layers:
                layer.num_columns += lengths[0]
                for memory in layer.state:
                    memory.count_tokens(lengths)
        given = [x[:, part] for part in pieces]
        parts += steps[0].run_before(steps[1], *given) if len(steps) == 2 else [steps[0].run(*given)]
        for layer in cache.layers:
            layer.reposition(lengths)
    return torch.cat(parts, 1)


def _pieces(cache: MemoryCache, num_rows: int, num: int) -> Iterator[list[slice]]:
    """Ranges of tokens to read in turn; a long range is split into two pieces that run side by side.

    No range goes beyond the next re-positioning.
    """
    done, most = 0, 2 * max(1, _PIECE // num_rows)
    while done < num:
        # All layers re-position after the same tokens.
        end = done + int(min(num - done, most, cache.layers[0].until_reposition()))
        middle = (done + end) // 2
        is_many = (middle - done) * num_rows > MOST_ROWS
        yield [slice(done, middle), slice(middle, end)] if is_many else [slice(done, end)]
        done = end


def _put_angles(step: HeadsStep, cos: Tensor, sin: Tensor, num_rows: int, num: int) -> None:
    for own, angles in ((step.cos, cos), (step.sin, sin)):
        own[: num_rows * num].view(num_rows, num, -1).copy_(angles)


def _now_and_next(memory: HeadMemory) -> list[list[int]]:
    """Number of slots in use, per row: now, and after the next merge."""
    budget = memory.budget
    return [[budget.num_open(num + more) for more in (0, budget.chunk_size)] for num in memory.num_merged]


def _groups(layer: MemoryLayer, of: HeadsLayer, num: int) -> list[HeadGroup]:
    """Kernel arguments of a layer's groups of heads, for reading `num` tokens per row."""
    config, dim = layer.config, of.head_dim
    lengths = [num] * layer.num_rows
    # Placeholders: the kernel computes queries, keys and values itself.
    k = layer.state[0].state.pending_keys.new_empty(layer.num_rows, config.num_kv_heads, 1, dim)
    given: dict[str, Any] = {
        "k": k,
        "v": k,
        "q": k.new_empty(layer.num_rows, of.q.shape[0] // dim, 1, dim, dtype=torch.float32),
        "temperature": config.tensor("slot_temperature", "cpu"),
        "bias": config.tensor("slot_bias", "cpu"),
    }
    return [
        memory.group(
            lengths,
            _now_and_next(memory) if num == 1 else memory.schedule(lengths),
            **given,
        )
        for memory in layer.state
    ]


def _factors(configs: Sequence[LayerConfig]) -> list[Tensor | None]:
    """Factors of the keys `[Hkv, K]`, per layer; None for 1."""
    like = torch.empty((), dtype=torch.float32, device="cpu")
    found = [config.key_factors(like) for config in configs]
    return [None if factors is None else factors[:, 0] for factors in found]
