"""Memories of requests to a converted model: rows of the library's caches while the requests run, vLLM's
blocks while they wait to be scheduled again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from ovq.convert import MemoryCache
from ovq_vllm.step import Group

# Alignment in bytes of each tensor in a block, enough for any dtype.
_ALIGNMENT = 8


class Block:
    """Layout of a cache row as bytes.

    Args:
        like: a cache that is not empty.

    Attributes:
        num_bytes: bytes of a row.
    """

    def __init__(self, like: MemoryCache) -> None:
        self._parts: list[dict[str, tuple[int, torch.Size, torch.dtype]]] = []
        self.num_bytes = 0
        for layer in like.layers:
            places = {}
            for name, tensor in layer.parts().items():
                shape, dtype = tensor.shape[1:], tensor.dtype
                places[name] = self.num_bytes, shape, dtype
                size = math.prod(shape) * dtype.itemsize
                self.num_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
            self._parts.append(places)

    def views(self, block: Tensor) -> list[dict[str, Tensor]]:
        """Views of the tensors of each layer in a block, `[num_bytes]` uint8."""
        return [
            {
                name: block[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                for name, (start, shape, dtype) in places.items()
            }
            for places in self._parts
        ]

    def write(self, cache: MemoryCache, row: int, block: Tensor) -> None:
        """Copy a row of a cache into a block."""
        for layer, views in zip(cache.layers, self.views(block), strict=True):
            for name, tensor in layer.parts().items():
                views[name].copy_(tensor[row])

    def read(self, block: Tensor, num_read: int, cache: MemoryCache) -> MemoryCache:
        """Fill an empty cache with the row in a block, written after `num_read` tokens; returns the cache."""
        for layer, views in zip(cache.layers, self.views(block), strict=True):
            layer.restore({name: view[None].clone() for name, view in views.items()}, num_read)
        return cache


class Place(NamedTuple):
    """Identifies a request by its block and the number of tokens it has read."""

    block: int
    num_read: int


class Running(NamedTuple):
    """Requests that share a cache since their last step, one row each.

    A place is None if its block is complete: the request continues from vLLM's copy in another block, and
    another request may be in the block of the old number.
    """

    places: Sequence[Place | None]
    cache: MemoryCache


class Memories:
    """Finds the caches of the requests of each step.

    The memory of a request stays in a cache from step to step. It is written to the request's block when a
    step does not include the request, or when the block is complete. Blocks of finished or preempted requests
    are reused by others.

    Args:
        make_cache: returns an empty cache.
        block: the layout of a block.
    """

    def __init__(self, make_cache: Callable[[], MemoryCache], block: Block) -> None:
        self.block = block
        self._make_cache = make_cache
        self._running: list[Running] = []

    def calls(self, groups: Sequence[Group], blocks: Tensor) -> Iterator[tuple[Tensor, MemoryCache]]:
        """Yield the model calls of a step: indices `[R, T]` of the step's tokens, and the cache to use.

        Args:
            groups: the requests of the step.
            blocks: `[blocks, num_bytes]` uint8.
        """
        block_size = groups[0].block_size
        requests = [request for group in groups for request in _requests(group)]
        continued = {place for place, _ in requests}
        needed = {place.block for place in continued}
        for places, cache in self._running:
            for row, place in enumerate(places):
                if place is not None and place not in continued and place.block not in needed:
                    self.block.write(cache, row, blocks[place.block])
        before, self._running = self._running, []
        together = {place: tokens for place, tokens in requests if len(tokens) == 1 and place.num_read}
        batches = [together] if together else []
        batches += [{place: tokens} for place, tokens in requests if place not in together]
        for batch in batches:
            found = self._found(set(batch), before, blocks)
            rows = torch.stack([batch[place] for place in found.places])
            yield rows, found.cache
            places = [Place(place.block, place.num_read + rows.shape[1]) for place in found.places]
            is_complete = [place.num_read % block_size == 0 for place in places]
            for row in compress(range(len(places)), is_complete):
                self.block.write(found.cache, row, blocks[places[row].block])
            still = [None if done else place for place, done in zip(places, is_complete, strict=True)]
            self._running.append(Running(still, found.cache))

    def _found(self, wanted: set[Place], before: Sequence[Running], blocks: Tensor) -> Running:
        """One cache for these requests, in the order of the last step so that few rows move."""
        parts: list[Running] = []
        for places, cache in before:
            kept = [row for row, place in enumerate(places) if place in wanted]
            if kept:
                own = cache if len(kept) == len(places) else cache.selected(kept)
                parts.append(Running([places[row] for row in kept], own))
        for place in wanted - {place for part in parts for place in part.places}:
            cache = self._make_cache()
            if place.num_read:
                self.block.read(blocks[place.block], place.num_read, cache)
            parts.append(Running([place], cache))
        if len(parts) == 1:
            return parts[0]
        joined = MemoryCache.concatenate([part.cache for part in parts])
        return Running([place for part in parts for place in part.places], joined)


def _requests(group: Group) -> Iterator[tuple[Place, Tensor]]:
    """Each request of a group, with the indices of its tokens among those of the step."""
    tokens = group.tokens.split(list(group.lengths))
    return zip(map(Place, group.block_ids, group.num_seen), tokens, strict=True)
