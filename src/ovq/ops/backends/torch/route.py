"""Routing: the slot of each key of a complete chunk, for many heads at once, fast and provably exact.

Routing is a hard argmax. Two backends whose matrix products round differently could disagree on a near tie
and from then on remember different tokens. Here one float32 matrix product computes the scores, and float64
decides every token whose two best candidates lie within the rounding error of that product. The result equals
the float64 reference, whatever the blocking, batch or thread count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.backends.torch.streams import CompleteChunk
from ovq.ops.options import NO_COSINE, NO_WEIGHT, ORDINARY, TIE, TINY, Options
from ovq.ops.random_init import random_priority
from ovq.ops.selection import best_two, lowest, padded_to_blocks
from ovq.ops.sums import slot_means

# Maximum number of (token, slot) pairs computed one by one in float64. Beyond it, as with repeated keys, one
# float64 matrix product is cheaper.
_PAIRS = 8192


class Router:
    """Assigns the keys of complete chunks to slots, and owns the scratch memory for it.

    Args:
        num_streams: maximum number of streams (rows times key/value heads) routed at once.
        max_slots: maximum number of slots of a stream.
        options: the layer's settings.
        like: a tensor with the routing dtype (float32 or float64) and device.

    Attributes:
        is_opener: `[S, C]` mask of the keys of the last routed chunk that opened a slot.
    """

    def __init__(self, *, num_streams: int, max_slots: int, options: Options, like: Tensor) -> None:
        self.options = options
        size = num_streams * options.chunk_size * padded_to_blocks(max_slots)
        self._scores = like.new_empty(size)

    def __call__(self, chunk: CompleteChunk, means: Tensor, mass: Tensor | None = None) -> Tensor:
        """Slots `[S, C]` of the chunk's keys; keys of weight 0 are the last to open one.

        Args:
            means: `[S, padded, K]` slot means of these streams, or more, zero beyond each stream's slots. For
                a stream without slots, the first row is overwritten by its first key, which opens slot 0.
            mass: `[S, M]` weights of the slots, likewise, or None. Slots of weight 0 attract no key.
        """
        keys, weights, before, step = chunk.keys, chunk.weights, chunk.before, chunk.step
        means = means[: len(before)]
        is_fresh = torch.tensor([n == 0 for n in before], device=keys.device)
        # The key that opens slot 0: the first of non-zero weight, else the first.
        first_key: int | Tensor = 0 if weights is None else (weights > 0).byte().argmax(-1, keepdim=True)
        is_first = is_fresh[:, None] & (torch.arange(keys.shape[1], device=keys.device) == first_key)
        is_empty = None if mass is None else mass[: len(before), : max(before)] <= 0
        if 0 in before:
            means[is_fresh, 0] = keys[is_first]
            if is_empty is not None:
                assert weights is not None
                # The mean as it will be read, with the rounding of the product and the quotient.
                means[is_fresh, 0] = slot_means(weights[..., None] * keys, weights)[is_first]
                if not is_empty.shape[1]:
                    is_empty = is_fresh[:, None].clone()
                is_empty[is_fresh, 0] = weights[is_first] <= 0
        existing = [max(n, 1) for n in before]
        scored = _Chunk(keys, means, existing, self._scores, is_empty)
        if not scored.is_ordinary:
            scored = _Chunk(keys.double(), means.double(), existing, self._scores, is_empty)
        slots = scored.nearest()
        self.is_opener = is_first
        opening = [a - n for a, n in zip(step.after, existing, strict=True)]
        if any(opening):
            if self.options.init == "random":
                seed, size = self.options.seed, keys.shape[1]
                pairs = zip(step.heads, step.num_seen, strict=True)
                priority = torch.stack([random_priority(seed, h, t, size) for h, t in pairs]).to(keys.device)
                if weights is not None:
                    priority.masked_fill_(weights <= 0, size)
                priority.masked_fill_(is_first, torch.inf)
            else:
                set_apart = torch.where(is_first, torch.inf, 0)
                if weights is not None:
                    set_apart.masked_fill_((weights <= 0) & (set_apart == 0), NO_WEIGHT)
                priority = scored.novelty(opening, set_apart)
            is_opener = lowest(priority, torch.tensor(opening, device=keys.device), max(opening))
            if self.options.merge == "updated":
                _merge_updated(slots, is_opener, keys, means, existing, is_empty, weights)
            # The j-th opening key, by position, opens slot existing + j.
            first = torch.tensor(existing, device=keys.device)[:, None]
            self.is_opener = is_first | is_opener
            slots = torch.where(is_opener, first + is_opener.cumsum(-1) - 1, slots)
        return slots.masked_fill_(is_first, 0)


class _Chunk:
    """Scores between a chunk's keys and the slot means, in their dtype, and in float64 for near ties.

    Args:
        keys: `[S, C, K]`, in float64 if lengths are not those of float32 products.
        means: `[S, padded, K]`.
        existing: number of slots of each stream, at least 1.
        scratch: memory for the scores.
        is_empty: `[S, n]` mask of slots that attract no key, or None.
    """

    def __init__(
        self, keys: Tensor, means: Tensor, existing: list[int], scratch: Tensor, is_empty: Tensor | None
    ) -> None:
        streams, tokens, _ = keys.shape
        num, smallest = padded_to_blocks(max(existing)), min(existing)
        self.keys, self.means = keys, means[:, :num]
        self.scores = scratch[: streams * tokens * num].to(keys.dtype).view(streams, tokens, num)
        torch.bmm(keys, self.means.transpose(1, 2), out=self.scores)
        if smallest == max(existing):
            self.scores[:, :, smallest:] = -torch.inf
        else:
            used = torch.tensor(existing, device=keys.device)[:, None]
            is_spare = torch.arange(smallest, num, device=keys.device) >= used
            self.scores[:, :, smallest:].masked_fill_(is_spare[:, None], -torch.inf)
        if is_empty is not None:
            self.scores[:, :, : is_empty.shape[1]].masked_fill_(is_empty[:, None], -torch.inf)
        self.key_norm = torch.linalg.vector_norm(keys, dim=-1)
        self.mean_norm = torch.linalg.vector_norm(self.means, dim=-1)
        self._eps = torch.finfo(keys.dtype).eps
        self._dense: Tensor | None = None

    @property
    def is_ordinary(self) -> bool:
        """Whether the lengths of all keys and means are in the range of float32 products."""
        return _are_ordinary(self.keys, self.key_norm) and _are_ordinary(self.means, self.mean_norm)

    def nearest(self) -> Tensor:
        """Slot `[S, C]` with the largest dot product (ties: lowest index); 0 for non-finite keys."""
        slots, best, second = best_two(self.scores)
        # Rounding errors of both compared K-term dot products: 2 K (eps / 2) |k| |D|.
        length = self.key_norm * self.mean_norm.amax(-1, keepdim=True)
        tolerance = (self.keys.shape[-1] * self._eps + 2 * TIE) * length
        is_contested = best - second <= tolerance
        if bool(is_contested.any()):
            s, t = is_contested.nonzero(as_tuple=True)
            exact = self._exact(s, t, self.scores[s, t] >= (best - tolerance)[s, t, None], is_cosine=False)
            floor = exact.amax(-1) - TIE * length[s, t].double()
            # argmax returns the lowest index of equal maxima.
            slots[s, t] = (exact >= floor[:, None]).byte().argmax(-1)
        return slots.masked_fill_(~best.isfinite(), 0)

    def novelty(self, opening: list[int], set_apart: Tensor) -> Tensor:
        """Highest cosine `[S, C]` of each key with a slot mean, exact in float64 for near ties about opening.

        Args:
            opening: number of keys of each stream that open slots: those with the lowest such cosine.
            set_apart: `[S, C]` replacement of the cosines where not 0: inf for keys that cannot open a slot.

        Turns the scores into cosines in place, so call `nearest` first.
        """
        # Zero keys and means have cosine 0 with every vector.
        cosines = self.scores.mul_(self.mean_norm[:, None].clamp(min=TINY).reciprocal())
        best = cosines.amax(-1) / self.key_norm.clamp(min=TINY)
        best.masked_fill_(~best.isfinite(), NO_COSINE)
        best = torch.where(set_apart > 0, set_apart.to(best.dtype), best)
        # A cosine is at most 1, with a few more roundings than a dot product.
        tolerance = 2 * (self.keys.shape[-1] + 8) * self._eps + 2 * TIE
        # Contested: the last key that opens a slot and the first that does not are closer than the tolerance.
        most = min(max(opening) + 1, best.shape[-1])
        ranked = best.topk(most, largest=False).values
        num = torch.tensor(opening, device=best.device)[:, None]
        boundary = ranked.gather(-1, (num - 1).clamp(min=0))
        following = ranked.gather(-1, num.clamp(max=ranked.shape[-1] - 1))
        is_contested = (following - boundary <= tolerance) & (num > 0)
        if bool(is_contested.any()):
            is_near = is_contested & ((best - boundary).abs() <= 2 * tolerance) & (best < NO_COSINE)
            s, t = is_near.nonzero(as_tuple=True)
            # The best slot in float64 is within the tolerance of the best in float32.
            own = cosines[s, t] / self.key_norm[s, t, None].clamp(min=TINY)
            exact = self._exact(s, t, own >= (best[s, t] - tolerance)[:, None], is_cosine=True)
            best = best.double()
            best[s, t] = exact.amax(-1)
        return best.double()

    def _exact(self, streams: Tensor, tokens: Tensor, is_candidate: Tensor, *, is_cosine: bool) -> Tensor:
        """Dot products or cosines `[A, n]` in float64 of A tokens with candidate slots, -inf elsewhere.

        Args:
            streams: `[A]`.
            tokens: `[A]`.
            is_candidate: `[A, n]`.
            is_cosine: whether to divide by the lengths.
        """
        num_pairs = int(is_candidate.sum())
        if num_pairs > _PAIRS:
            if self._dense is None:
                self._dense = torch.bmm(self.keys.double(), self.means.double().transpose(1, 2))
            exact = self._dense[streams, tokens]
            if is_cosine:
                key_norm, mean_norm = (x.double().norm(dim=-1) for x in (self.keys, self.means))
                exact /= key_norm[streams, tokens, None].clamp(min=TINY) * mean_norm[streams].clamp(min=TINY)
            return exact.masked_fill_(~is_candidate, -torch.inf)
        exact = torch.full(is_candidate.shape, -torch.inf, dtype=torch.float64, device=self.keys.device)
        a, n = is_candidate.nonzero(as_tuple=True)
        keys, means = self.keys[streams[a], tokens[a]].double(), self.means[streams[a], n].double()
        products = (keys * means).sum(-1)
        if is_cosine:
            products /= keys.norm(dim=-1).clamp(min=TINY) * means.norm(dim=-1).clamp(min=TINY)
        exact[a, n] = products
        return exact


def _are_ordinary(x: Tensor, norm: Tensor) -> bool:
    """Whether all vectors `x` `[S, N, K]` with lengths `norm` `[S, N]` are zero or of `ORDINARY` length."""
    shortest, longest = ORDINARY
    is_zero = norm == 0
    is_ordinary = (norm >= shortest) & (norm <= longest)
    # A length of zero may come from a non-zero vector whose squares underflow.
    return bool((is_ordinary | is_zero).all()) and not bool(x[is_zero].any())


def _merge_updated(
    slots: Tensor,
    is_opener: Tensor,
    keys: Tensor,
    means: Tensor,
    existing: list[int],
    is_empty: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Let keys that open no slot also merge into slots opened by their own chunk (in place).

    An ablation, written for clarity and entirely in float64.
    """
    for s, n in enumerate(existing):
        if not bool(is_opener[s].any()):
            continue
        own, candidates = keys[s].double(), torch.cat([means[s, :n], keys[s, is_opener[s]]]).double()
        scores = own @ candidates.T
        if is_empty is not None and weights is not None:
            empty = torch.cat([is_empty[s, :n], weights[s, is_opener[s]] <= 0])
            scores = scores.masked_fill(empty, -torch.inf)
            candidates = candidates.masked_fill(empty[:, None], 0)
        best = scores.amax(-1)
        floor = best - TIE * own.norm(dim=-1) * candidates.norm(dim=-1).max()
        # Ties go to the older slot, which has the lower index; non-finite scores to slot 0.
        slots[s] = torch.where(best.isfinite(), (scores >= floor[:, None]).byte().argmax(-1), 0)
