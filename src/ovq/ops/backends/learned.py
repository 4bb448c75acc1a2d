"""`Merging`: chunks that are merged without being read; `Learned`: where a backend says their tokens went."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan


@dataclasses.dataclass(frozen=True)
class Merging:
    """Complete chunks, among others, that are to be merged into dictionaries without being read.

    Attributes:
        k: `[num_chunks, W, Hkv, K]`. v: likewise.
        sums: `[R, Hkv, M, ...]`, contiguous; updated in place.
        plan: what is done, with one query head per key/value head.
        token_weights: `[num_chunks, W, Hkv, 1]` where tokens have weights.
        fading: `[num_chunks, Hkv]` where tokens forget (`with_frames`): what slots hold is multiplied by that
            when a chunk is complete.
    """

    k: Tensor
    v: Tensor
    sums: Dictionary
    plan: Plan
    token_weights: Tensor | None = None
    fading: Tensor | None = None

    @property
    def gates(self) -> list[str]:
        """The arguments of a call with a number for each token that there are."""
        given = {"token_weights": self.token_weights, "log_forget": self.fading}
        return [name for name, x in given.items() if x is not None]


@dataclasses.dataclass(frozen=True)
class Learned:
    """Where the tokens of a call went when their chunks were merged, and where chunks moved earlier slots.

    Attributes:
        slots: `[num_chunks, W, Hkv]` slot of each token of a complete chunk; others have no meaning.
        moved: `[num_chunks, Hkv, M]` where the chunk put what each slot held before it: into another slot, or
            where it was. None where rules of merging never move a slot.
    """

    slots: Tensor
    moved: Tensor | None

    @classmethod
    def of_moves(cls, slots: Tensor, source: Tensor, target: Tensor, num_slots: int) -> Learned:
        """The report of kernels that list what they move.

        Args:
            slots: see above.
            source: `[num_chunks, Hkv, P]` slots that each chunk moved, -1 after the last one.
            target: `[num_chunks, Hkv, P]` the slots that they went into.
            num_slots: M.

        Example:
            >>> source, target = torch.tensor([[[2, -1]]]), torch.tensor([[[0, 7]]])
            >>> Learned.of_moves(torch.zeros(1, 4, 1), source, target, 3).moved.tolist()
            [[[0, 1, 0]]]
        """
        moved = torch.arange(num_slots, dtype=torch.int32, device=source.device)
        moved = moved.repeat(*source.shape[:2], 1)
        # What follows the first -1 has no meaning.
        chunk, head, place = (source.ge(0).cumprod(-1) > 0).nonzero(as_tuple=True)
        moved[chunk, head, source[chunk, head, place].long()] = target[chunk, head, place].int()
        return cls(slots, moved)

    def homes(self, num_slots: int) -> Tensor:
        """`[num_chunks, Hkv, M + W]` int64: where what each of M slots held went, and each token."""
        num_chunks, _, heads = self.slots.shape
        moved = self.moved
        if moved is None:
            moved = torch.arange(num_slots, device=self.slots.device).expand(num_chunks, heads, num_slots)
        return torch.cat([moved.long(), self.slots.long().transpose(1, 2)], 2)
