"""`Learned`: where the tokens of a call went, chunk by chunk, as a backend reports it."""

from __future__ import annotations

import dataclasses

from torch import Tensor


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
