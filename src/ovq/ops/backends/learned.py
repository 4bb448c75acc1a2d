"""`Learned`: where the tokens of a call went, chunk by chunk, as a backend reports it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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


# From keys `[num_chunks, W, Hkv, K]`, values, dictionaries `[R, Hkv, M, ...]` that are updated in place, and
# the plan of the call, with one query head per key/value head. Weights `[num_chunks, W, Hkv, 1]` come last.
Learn = Callable[..., Learned]
