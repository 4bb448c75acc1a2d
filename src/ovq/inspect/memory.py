"""`LayerMemory`: what one layer kept of a text, and what its queries read, for any kind of memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ovq.ops.options import check_sizes

EXACT = -1
"""Slot number of a token that is kept exactly, in no slot."""
DROPPED = -2
"""Slot number of a token that a head without slots has dropped."""

# Squared differences below this share of a vector's squared length count as rounding.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LayerMemory:
    """What one layer kept of a text of T tokens, and what its queries read.

    Query head h of H reads the memory of key/value head `h // (H // Hkv)` of Hkv. A key/value head keeps the
    first and the last tokens exactly, and merges those in between into its slots, a chunk at a time. An OVQ
    layer only keeps the tokens of an incomplete chunk exactly.

    Attributes:
        layer: Index of the layer in the model.
        num_slots: `[Hkv]` largest number of slots.
        num_exact: `[Hkv]` largest number of exact tokens; when it is reached, a chunk of them is merged.
        num_sinks: Tokens at the beginning that are never merged.
        chunk_size: Tokens per chunk.
        slots: `[Hkv, T]` int32 slot of each token right after its own chunk was merged; `EXACT` or `DROPPED`
            if in none.
        moves: `[X, 4]` int32 rows of chunk, head, slot and the slot that it was merged into with that chunk;
            of each head, the first chunk first.
            Only rules that merge pairs have any.
        final_slots: `[Hkv, T]` int32 slot of each token at the end of the text, likewise.
        kept: `[Hkv, T]` float32 share of each token's value that its slot still gives at the end: 1 -
            |v - D|^2 / |v - m|^2, where D is the mean of its slot and m the mean of all values of the head.
            1 for an exact token; 0 if the slot is no better than m, and for dropped tokens.
        entries: `[H, T, k]` int32 the items with the k largest weights of each query, in descending order: a
            slot, or -1 - t for the exact token t.
        weights: `[H, T, k]` float32 weights of `entries`; 0 if there are fewer than k.
        shares: `[H, T, 3]` float32 total weight of each query on exact tokens, on slots of one token, and on
            slots of several.
    """

    layer: int
    num_slots: Sequence[int]
    num_exact: Sequence[int]
    num_sinks: int
    chunk_size: int
    slots: np.ndarray
    moves: np.ndarray
    final_slots: np.ndarray
    kept: np.ndarray
    entries: np.ndarray
    weights: np.ndarray
    shares: np.ndarray

    @property
    def num_heads(self) -> int:
        """H, number of query heads."""
        return self.entries.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """Hkv, number of key/value heads."""
        return self.slots.shape[0]

    @property
    def num_tokens(self) -> int:
        """T, number of tokens of the text."""
        return self.slots.shape[1]

    def num_chunks(self, kv_head: int) -> int:
        """Number of chunks that a key/value head has merged by the end of the text."""
        return max(0, (self.num_tokens - self.num_exact[kv_head]) // self.chunk_size + 1)

    def tokens(self, chunk: int) -> slice:
        """The tokens of a chunk."""
        start = self.num_sinks + chunk * self.chunk_size
        return slice(start, start + self.chunk_size)

    def merged_after(self, chunk: int, kv_head: int) -> int:
        """Number of tokens that the head had read when it merged a chunk."""
        return self.num_exact[kv_head] + chunk * self.chunk_size

    def kv_head(self, head: int) -> int:
        """The key/value head whose memory a query head reads."""
        return head // (self.num_heads // self.num_kv_heads)

    def counts(self) -> np.ndarray:
        """`[Hkv, T]` number of tokens in the slot of each token at the end; 0 if exact, -1 if dropped."""
        found = np.where(self.final_slots == DROPPED, -1, 0)
        for of_head, slots in zip(found, self.final_slots, strict=True):
            is_merged = slots >= 0
            of_head[is_merged] = np.bincount(slots[is_merged], minlength=1)[slots[is_merged]]
        return found


class Reads(NamedTuple):
    """The arrays of `LayerMemory` about queries, for some of the queries."""

    entries: np.ndarray
    weights: np.ndarray
    shares: np.ndarray

    @staticmethod
    def joined(parts: Sequence[Reads]) -> Reads:
        """The arrays of all parts, concatenated over queries."""
        return Reads(*(np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True)))


def reads_of(weights: Tensor, positions: Tensor, num_reads: int, *, is_single: Tensor | None) -> Reads:
    """Summary of the attention weights of t queries.

    Args:
        weights: `[H, t, n + P]` weights on n slots, then on P exact tokens.
        positions: `[P]` positions of the exact tokens in the text.
        num_reads: k, number of largest weights to keep per query.
        is_single: `[Hkv, n]` whether each slot holds one token; None without slots.

    Raises:
        ValueError: If `num_reads` is not an integer of at least 1.
    """
    check_sizes(1, num_reads=num_reads)
    num_heads, _, num_sources = weights.shape
    num_open = num_sources - len(positions)
    top, place = weights.topk(min(num_reads, num_sources), -1)
    entries = torch.where(place < num_open, place, -1 - positions[(place - num_open).clamp(min=0)])
    missing = (0, num_reads - top.shape[-1])
    shares = [weights[..., num_open:].sum(-1)]
    if is_single is None:
        shares += [torch.zeros_like(shares[0])] * 2
    else:
        is_single = is_single.repeat_interleave(num_heads // len(is_single), 0)[:, None]
        on_slots = weights[..., :num_open]
        shares += [(on_slots * is_one).sum(-1) for is_one in (is_single, ~is_single)]
    return Reads(
        entries=torch.nn.functional.pad(entries, missing).to(torch.int32).cpu().numpy(),
        weights=torch.nn.functional.pad(top, missing).float().cpu().numpy(),
        shares=torch.stack(shares, -1).float().cpu().numpy(),
    )


def moves_of(to: np.ndarray, chunk: int) -> np.ndarray:
    """The rows of `LayerMemory.moves` of one chunk.

    Args:
        to: `[Hkv, M]` slot that the content of each slot went to; for empty ones itself or a negative number.
        chunk: Index of the chunk.
    """
    head, slot = np.nonzero((to >= 0) & (to != np.arange(to.shape[1])))
    return np.stack([np.full_like(head, chunk), head, slot, to[head, slot]], 1).astype(np.int32)


def kept_share(values: Tensor, slot_values: Tensor, is_single: Tensor, places: np.ndarray) -> np.ndarray:
    """See `LayerMemory.kept`.

    Args:
        values: `[Hkv, T, V]` of the tokens. slot_values: `[Hkv, N, V]` of the slots at the end.
        is_single: `[Hkv, N]` whether each slot holds one token, with its value.
        places: `[Hkv, T]` as `LayerMemory.final_slots`.
    """
    values = values.double()
    slots = torch.from_numpy(places).to(values.device, torch.int64)
    means, is_exact = values, slots == EXACT
    if slot_values.shape[1]:
        of_slot = slots.clamp(min=0)
        means = slot_values.double().gather(1, of_slot[..., None].expand(-1, -1, values.shape[-1]))
        # A slot's only token loses nothing but the rounding of its sum.
        is_exact = is_exact | (is_single.gather(1, of_slot) & (slots >= 0))
    lost = (values - means).square().sum(-1).masked_fill(is_exact, 0)
    spread = (values - values.mean(1, keepdim=True)).square().sum(-1)
    # If all values are equal, any loss is rounding.
    rounding = _ROUNDING * values.square().sum(-1).clamp(min=torch.finfo(torch.float64).tiny)
    lost = lost.masked_fill(lost <= rounding, 0)
    share = (1 - lost / spread.clamp(min=rounding)).masked_fill(slots == DROPPED, 0)
    return share.clamp(0, 1).float().cpu().numpy()
