"""The slots of a `"kvm"` layer: how a chunk of tokens enters them, and how queries read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Slots:
    """Slots of R rows, M allocated per row, of which a row may use fewer. Immutable.

    Attributes:
        key_sum: `[R, Hkv, M, K]` sum of each slot's keys: the first as it is, the others times their gates.
        value_sum: `[R, Hkv, M, V]` likewise for values.
        value_length: `[R, Hkv, M, 1]` length of the first value of each slot.
        num_open: slots in use, per row.
        num_sinks: number of first slots that nothing is added to.
        normalize: layer norm that turns a sum of keys into a slot's key.
    """

    key_sum: Tensor
    value_sum: Tensor
    value_length: Tensor
    num_open: list[int]
    num_sinks: int
    normalize: Callable[[Tensor], Tensor]

    @cached_property
    def keys(self) -> Tensor:
        """The keys that queries and tokens are compared with, `[R, Hkv, M, K]`."""
        return self.normalize(self.key_sum)

    @cached_property
    def values(self) -> Tensor:
        """The values `[R, Hkv, M, V]`: the direction of the sum, and the length of the first value."""
        return F.normalize(self.value_sum, dim=-1) * self.value_length

    @property
    def size(self) -> int:
        """Number of allocated slots, M."""
        return self.key_sum.shape[2]

    def updated(
        self, k: Tensor, v: Tensor, gate: Tensor, *, num_open: list[int], is_active: list[bool]
    ) -> Slots:
        """The slots after a chunk has entered them.

        Keys that are least similar to the slots open slots, in the order of the tokens, and enter them
        without a gate. Every other key goes to the slot with which its dot product is largest, among the new
        ones too (ties: lowest index).

        Args:
            k: `[R, Hkv, C, K]`, normalised like the keys of slots.
            v: `[R, Hkv, C, V]`.
            gate: `[R, Hkv, C, 1]`, factor of each token that is added to an existing slot.
            num_open: slots in use afterwards, per row.
            is_active: whether the chunk enters, per row; other rows do not change.
        """
        added = [after - before for after, before in zip(num_open, self.num_open, strict=True)]
        slots, chunk_size = self, k.shape[2]
        is_merged = torch.tensor(is_active, device=k.device)[:, None, None]
        if any(added):
            is_new = self._is_new(k, added)
            is_merged = is_merged & ~is_new
            last = torch.tensor(self.num_open, device=k.device)[:, None, None] - 1
            # Tokens that open no slot add zeros to one that another token has opened, or to the first.
            place = (last + is_new.cumsum(-1)).clamp(min=0)
            slots = self._with(k, v, is_new[..., None].to(k.dtype), place, num_open)
            length = torch.linalg.vector_norm(v, dim=-1, keepdim=True) * is_new[..., None]
            value_length = _added(self.value_length, length, place, max(num_open))
            slots = dataclasses.replace(slots, value_length=value_length)
        if all(n == chunk_size or not active for n, active in zip(added, is_active, strict=True)):
            return slots
        weight = gate * is_merged[..., None].to(gate.dtype)
        return slots._with(k, v, weight, slots._nearest(k), num_open)

    def _with(self, k: Tensor, v: Tensor, weight: Tensor, place: Tensor, num_open: list[int]) -> Slots:
        """The slots with `weight [R, Hkv, C, 1]` times each token added at `place [R, Hkv, C]`."""
        size = max(num_open)
        key_sum = _added(self.key_sum, k * weight, place, size)
        value_sum = _added(self.value_sum, v * weight, place, size)
        return dataclasses.replace(self, key_sum=key_sum, value_sum=value_sum, num_open=num_open)

    @torch.no_grad()
    def _is_new(self, k: Tensor, added: list[int]) -> Tensor:
        """Whether each token opens a slot, `[R, Hkv, C]`: the `added` least similar do (ties: the first)."""
        # While there are no slots, every token of the chunk opens one.
        similarity = self._open_scores(k, num_closed=0).amax(-1) if self.size else k.new_zeros(k.shape[:3])
        rank = similarity.argsort(dim=-1, stable=True).argsort(dim=-1)
        return rank < torch.tensor(added, device=k.device)[:, None, None]

    @torch.no_grad()
    def _nearest(self, k: Tensor) -> Tensor:
        """Index of the slot that each token is added to, `[R, Hkv, C]`."""
        return self._open_scores(k, num_closed=self.num_sinks).argmax(-1)

    def _open_scores(self, k: Tensor, *, num_closed: int) -> Tensor:
        """Dot products with the slots `[R, Hkv, C, M]`; -inf for unused ones and the first `num_closed`."""
        scores = k @ self.keys.detach().transpose(-1, -2)
        slot = torch.arange(self.size, device=k.device)
        num_open = torch.tensor(self.num_open, device=k.device)[:, None, None, None]
        return scores.masked_fill((slot < num_closed) | (slot >= num_open), -torch.inf)

    def read(self, q_slots: Tensor, q_window: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention with one softmax over slots and tokens, causal among the tokens.

        Args:
            q_slots: `[R, H, T, K]` queries for slots, scaled.
            q_window: `[R, H, T, K]` queries for tokens, scaled.
            k: `[R, Hkv, S, K]`; the last T are the keys of the queries' own tokens.
            v: `[R, Hkv, S, V]`.

        Returns:
            `[R, H, T, V]`.
        """
        num_queries, num_kv_heads = q_window.shape[2], k.shape[1]

        def products(q: Tensor, keys: Tensor) -> Tensor:
            """Dot products `[R, Hkv, G, T, S]` of grouped queries and keys."""
            grouped = q.unflatten(1, (num_kv_heads, -1))
            return (grouped.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (-1, num_queries))

        scores = products(q_window, k)
        if num_queries > 1:
            is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=k.device)
            scores = scores.masked_fill(is_later.triu(1 + k.shape[2] - num_queries), -torch.inf)
        if self.size:
            of_slots = products(q_slots, self.keys.to(k.dtype))
            if min(self.num_open) < self.size:
                slot = torch.arange(self.size, device=k.device)
                num_open = torch.tensor(self.num_open, device=k.device)[:, None, None, None, None]
                of_slots = of_slots.masked_fill(slot >= num_open, -torch.inf)
            scores, v = torch.cat([of_slots, scores], -1), torch.cat([self.values.to(v.dtype), v], 2)
        weights = scores.to(self.key_sum.dtype).softmax(-1).to(v.dtype)
        return (weights.flatten(2, 3) @ v).unflatten(2, (-1, num_queries)).flatten(1, 2)


def _added(sums: Tensor, x: Tensor, place: Tensor, size: int) -> Tensor:
    """`sums [R, h, M, D]`, extended to `size` places, with `x [R, h, C, D]` added at `place [R, h, C]`."""
    sums = F.pad(sums, (0, 0, 0, size - sums.shape[2]))
    return sums.scatter_add(2, place[..., None].expand_as(x), x)
