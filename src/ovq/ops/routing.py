"""Which slot each key of a complete chunk goes to, for many heads at once: fast, and provably exact.

Routing is a hard argmax, so two backends whose matrix products round differently could disagree on a near tie
and from then on remember different things. Here scores are computed in float32 by one matrix product, and
every token whose best two candidates lie within the rounding error of that product is decided again in
float64. The result is that of the float64 reference, whatever the blocking, batch or thread count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.novelty import random_priority
from ovq.ops.rules import Rules

# Columns of the score matrix that are reduced together: the best slot is found as the best block, then the
# best in it, which reads the scores once, vectorised (an argmax over all columns is seven times slower on a
# CPU).
BLOCK = 32
# Pairs of (token, slot) decided again at once; bounds the memory of float64 copies to tens of megabytes.
_PAIRS = 65536
# What lengths are clamped to before a division, here and in the reference.
_TINY = 1e-30


def padded_slots(num: int) -> int:
    """`num` rounded up to whole blocks."""
    return -(-num // BLOCK) * BLOCK


class Router:
    """Assigns the keys of complete chunks to slots; holds the scratch memory for it.

    Args:
        num_streams: most streams (rows times key/value heads) routed at once.
        max_slots: most slots of a stream.
        rules: the layer's settings.
        like: a tensor that gives the routing dtype (float32 or float64) and device.
    """

    def __init__(self, *, num_streams: int, max_slots: int, rules: Rules, like: Tensor) -> None:
        self.rules = rules
        self._scores = like.new_empty(num_streams * rules.chunk_size * padded_slots(max_slots))
        self._scaled: Tensor | None = None

    def __call__(
        self,
        keys: Tensor,
        means: Tensor,
        before: list[int],
        after: list[int],
        *,
        heads: list[int],
        num_seen: list[int],
    ) -> Tensor:
        """Slots `[S, C]` of the chunk's keys.

        Args:
            keys: `[S, C, K]` keys of a complete chunk in the routing dtype.
            means: `[S, padded, K]` slot means, zero beyond each stream's slots. For a stream without slots
                the first row is overwritten by its first key, which opens slot 0.
            before: slots of each stream before the chunk.
            after: slots of each stream once the chunk is merged.
            heads: key/value head of each stream, for `init="random"`.
            num_seen: tokens each stream's row has seen at the end of the chunk, likewise.
        """
        is_fresh = [n == 0 for n in before]
        if any(is_fresh):
            fresh = torch.tensor(is_fresh, device=keys.device)
            means[fresh, 0] = keys[fresh, 0]
        existing = [max(n, 1) for n in before]
        scores = self._score(keys, means, existing)
        key_norm = torch.linalg.vector_norm(keys, dim=-1)
        mean_norm = torch.linalg.vector_norm(means, dim=-1)
        # Rounding error of a K-term dot product, both sides of a comparison: 2 K (eps / 2) |k| |D|.
        rounding = keys.shape[-1] * torch.finfo(keys.dtype).eps
        tolerance = rounding * key_norm * mean_norm.amax(-1, keepdim=True)
        slots = _certified_argmax(scores, tolerance, keys, means)
        if any(is_fresh):
            slots[fresh, 0] = 0
        opening = [a - n for a, n in zip(after, existing, strict=True)]
        if any(opening):
            if self.rules.init == "random":
                chosen = self._random_openers(heads, num_seen, opening, is_fresh)
            else:
                chosen = self._novel_openers(scores, keys, means, key_norm, mean_norm, opening, is_fresh)
            if self.rules.merge == "updated":
                _merge_updated(slots, chosen, keys, means, existing)
                if any(is_fresh):
                    slots[fresh, 0] = 0
            # The j-th key that opens a slot, by position, opens slot existing + j.
            first = torch.tensor(existing, device=keys.device)[:, None]
            slots = torch.where(chosen, first + chosen.cumsum(-1) - 1, slots)
        return slots

    def _score(self, keys: Tensor, means: Tensor, existing: list[int]) -> Tensor:
        """Dot products `[S, C, padded]` of keys and slot means, -inf for spare slots."""
        streams, tokens, _ = keys.shape
        num = padded_slots(max(existing))
        scores = self._scores[: streams * tokens * num].view(streams, tokens, num)
        torch.bmm(keys, means[:, :num].transpose(1, 2), out=scores)
        smallest = min(existing)
        if smallest == max(existing):
            scores[:, :, smallest:] = -torch.inf
        else:
            used = torch.tensor(existing, device=keys.device)[:, None]
            spare = torch.arange(smallest, num, device=keys.device) >= used
            scores[:, :, smallest:].masked_fill_(spare[:, None], -torch.inf)
        return scores

    def _random_openers(
        self, heads: list[int], num_seen: list[int], opening: list[int], is_fresh: list[bool]
    ) -> Tensor:
        """Mask `[S, C]` of a random choice of `opening[s]` keys of each stream."""
        seed, size = self.rules.seed, self.rules.chunk_size
        pairs = zip(heads, num_seen, strict=True)
        priority = torch.stack([random_priority(seed, h, t, size) for h, t in pairs])
        priority[:, 0].masked_fill_(torch.tensor(is_fresh), torch.inf)
        return _first(priority.argsort(dim=-1), opening).to(self._scores.device)

    def _novel_openers(
        self,
        scores: Tensor,
        keys: Tensor,
        means: Tensor,
        key_norm: Tensor,
        mean_norm: Tensor,
        opening: list[int],
        is_fresh: list[bool],
    ) -> Tensor:
        """Mask `[S, C]` of the `opening[s]` keys of each stream whose best cosine with a slot is lowest."""
        num = scores.shape[-1]
        if self._scaled is None:
            self._scaled = torch.empty_like(self._scores)
        scaled = self._scaled[: scores.numel()].view_as(scores)
        # A key or mean of length zero has cosine 0 with everything.
        torch.mul(scores, mean_norm[:, None, :num].clamp(min=_TINY).reciprocal(), out=scaled)
        best = scaled.amax(-1) / key_norm.clamp(min=_TINY)
        # Keys that are not finite have no cosine: they are the last to open a slot.
        best.nan_to_num_(nan=2.0)
        best[:, 0].masked_fill_(torch.tensor(is_fresh, device=best.device), torch.inf)
        order = best.argsort(dim=-1, stable=True)
        # Contested: the last key that opens a slot and the first that does not are too close to tell apart.
        # Cosines are at most 1 long; a few more roundings than a dot product go into one.
        tolerance = 2 * (keys.shape[-1] + 8) * torch.finfo(keys.dtype).eps
        num_opening = torch.tensor(opening, device=best.device)[:, None]
        boundary = best.gather(-1, order.gather(-1, (num_opening - 1).clamp(min=0)))
        following = best.gather(-1, order.gather(-1, num_opening.clamp(max=best.shape[-1] - 1)))
        is_contested = (following - boundary <= tolerance) & (num_opening > 0)
        if bool(is_contested.any()):
            near = is_contested & ((best - boundary).abs() <= 2 * tolerance)
            streams, tokens = near.nonzero(as_tuple=True)
            cosines = scaled[streams, tokens] / key_norm[streams, tokens, None].clamp(min=_TINY)
            # The best slot in float64 is among those that float32 cannot tell from its best.
            candidates = cosines >= (best[streams, tokens] - tolerance)[:, None]
            exact = _exact_products(candidates, streams, keys[streams, tokens], means, is_cosine=True)
            best = best.double()
            best[streams, tokens] = exact.amax(-1)
            order = best.argsort(dim=-1, stable=True)
        return _first(order, opening)


def _certified_argmax(scores: Tensor, tolerance: Tensor, keys: Tensor, means: Tensor) -> Tensor:
    """Slot `[S, C]` of the largest dot product, ties to the lowest index, as float64 would decide."""
    streams, tokens, num = scores.shape
    blocks = scores.view(streams, tokens, num // BLOCK, BLOCK)
    block_best = blocks.amax(-1)
    block = block_best.argmax(-1, keepdim=True)
    inside = blocks.gather(2, block[..., None].expand(-1, -1, 1, BLOCK)).squeeze(2)
    place = inside.argmax(-1, keepdim=True)
    best = inside.gather(-1, place)
    # The best of all the others: the other blocks, and the rest of the winner's own.
    inside.scatter_(-1, place, -torch.inf)
    block_best.scatter_(-1, block, -torch.inf)
    second = torch.maximum(inside.amax(-1), block_best.amax(-1))
    slots = (block * BLOCK + place).squeeze(-1)
    contested = best.squeeze(-1) - second <= tolerance
    if bool(contested.any()):
        s, t = contested.nonzero(as_tuple=True)
        floor = (best.squeeze(-1) - tolerance)[s, t]
        exact = _exact_products(scores[s, t] >= floor[:, None], s, keys[s, t], means, is_cosine=False)
        # argmax returns the first of equal maxima, which is the lowest index.
        slots[s, t] = exact.argmax(-1)
    return slots


def _exact_products(
    candidates: Tensor, streams: Tensor, keys: Tensor, means: Tensor, *, is_cosine: bool
) -> Tensor:
    """Dot products or cosines `[A, n]` in float64 of tokens with their candidate slots, -inf elsewhere.

    Args:
        candidates: `[A, n]` mask.
        streams: `[A]` stream of each token.
        keys: `[A, K]`.
        means: `[S, padded, K]`.
        is_cosine: divide by the lengths.
    """
    token, slot = candidates.nonzero(as_tuple=True)
    exact = torch.full(candidates.shape, -torch.inf, dtype=torch.float64, device=keys.device)
    for i in range(0, len(token), _PAIRS):
        a, n = token[i : i + _PAIRS], slot[i : i + _PAIRS]
        pair_keys, pair_means = keys[a].double(), means[streams[a], n].double()
        products = (pair_keys * pair_means).sum(-1)
        if is_cosine:
            products /= (pair_keys.norm(dim=-1) * pair_means.norm(dim=-1)).clamp(min=_TINY)
        exact[a, n] = products
    return exact


def _first(order: Tensor, num: list[int]) -> Tensor:
    """Mask `[S, C]` of the first `num[s]` tokens in each stream's order `[S, C]`."""
    is_first = (
        torch.arange(order.shape[-1], device=order.device) < torch.tensor(num, device=order.device)[:, None]
    )
    return torch.zeros_like(is_first).scatter_(-1, order, is_first)


def _merge_updated(slots: Tensor, chosen: Tensor, keys: Tensor, means: Tensor, existing: list[int]) -> None:
    """Let the keys that open no slot go to the slots opened by their own chunk as well (in place).

    An ablation, off by default: written for clarity, in float64 throughout.
    """
    for s, n in enumerate(existing):
        opened = keys[s, chosen[s]].double()
        if len(opened) == 0:
            continue
        candidates = keys[s].double()
        own = (candidates * means[s, slots[s].clamp(max=n - 1)].double()).sum(-1)
        fresh = (candidates[:, None] * opened[None]).sum(-1)
        best = fresh.argmax(-1)
        # Strictly better: on a tie the slot that was there before has the lower index.
        wins = fresh.gather(-1, best[:, None]).squeeze(-1) > own
        slots[s] = torch.where(wins, n + best, slots[s])
