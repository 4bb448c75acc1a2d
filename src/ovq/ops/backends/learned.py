"""Merging without attention: its input `Merging` (chunks) and output `Learned` (slots of their tokens)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan


@dataclasses.dataclass(frozen=True)
class Merging:
    """Chunks to merge into dictionaries without computing attention; incomplete chunks are ignored.

    Attributes:
        k: `[num_chunks, W, Hkv, K]`. v: likewise.
        sums: `[R, Hkv, M, ...]`, contiguous; updated in place.
        plan: the work to do, with one query head per key/value head.
        token_weights: `[num_chunks, W, Hkv, 1]`; None without token weights.
        fading: `[num_chunks, Hkv]` factor of the sums and weights of slots when a chunk is complete
            (`with_forgetting`); None without forgetting.
    """

    k: Tensor
    v: Tensor
    sums: Dictionary
    plan: Plan
    token_weights: Tensor | None = None
    fading: Tensor | None = None

    @property
    def gates(self) -> list[str]:
        """Names of the per-token gates that are given."""
        given = {"token_weights": self.token_weights, "log_forget": self.fading}
        return [name for name, x in given.items() if x is not None]


@dataclasses.dataclass(frozen=True)
class Learned:
    """Slots of the tokens when their chunks were merged, and the moves of earlier slots by each chunk.

    Attributes:
        slots: `[num_chunks, W, Hkv]` slot of each token of a complete chunk; undefined for other tokens.
        moved: `[num_chunks, Hkv, M]` slot that each earlier slot was merged into by the chunk, or the slot
            itself. None for rules that never merge slots.
    """

    slots: Tensor
    moved: Tensor | None

    @classmethod
    def of_moves(cls, slots: Tensor, source: Tensor, target: Tensor, num_slots: int) -> Learned:
        """`Learned` from the lists of moved slots that kernels return.

        Args:
            slots: as above.
            source: `[num_chunks, Hkv, P]` slots that each chunk merged into others, -1 after the last one.
            target: `[num_chunks, Hkv, P]` the slots that they were merged into.
            num_slots: M.

        Example:
            >>> source, target = torch.tensor([[[2, -1]]]), torch.tensor([[[0, 7]]])
            >>> Learned.of_moves(torch.zeros(1, 4, 1), source, target, 3).moved.tolist()
            [[[0, 1, 0]]]
        """
        moved = torch.arange(num_slots, dtype=torch.int32, device=source.device)
        moved = moved.repeat(*source.shape[:2], 1)
        # Entries after the first -1 are undefined.
        chunk, head, place = (source.ge(0).cumprod(-1) > 0).nonzero(as_tuple=True)
        moved[chunk, head, source[chunk, head, place].long()] = target[chunk, head, place].int()
        return cls(slots, moved)

    def homes(self, num_slots: int) -> Tensor:
        """Slots of M earlier slots, then of tokens, after the chunk, `[num_chunks, Hkv, M + W]` int64."""
        num_chunks, _, heads = self.slots.shape
        moved = self.moved
        if moved is None:
            moved = torch.arange(num_slots, device=self.slots.device).expand(num_chunks, heads, num_slots)
        return torch.cat([moved.long(), self.slots.long().transpose(1, 2)], 2)
