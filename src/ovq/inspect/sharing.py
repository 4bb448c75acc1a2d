"""How many tokens share a slot, in a few levels from kept exactly to dropped."""

from __future__ import annotations

import dataclasses

import numpy as np

from ovq.inspect.memory import LayerMemory

_HIGHEST = (0, 1, 4, 16, 64)
LEVEL_NAMES = (
    "exact: in no slot",
    "a slot of its own",
    "shared by 2-4",
    "shared by 5-16",
    "shared by 17-64",
    "shared by 65 or more",
    "dropped: a head without slots",
)
"""Names of the levels, from exact to dropped, in the order of the page and the figures."""


def levels(counts: np.ndarray) -> np.ndarray:
    """The level of each token, as an index of `LEVEL_NAMES`, from `LayerMemory.counts`.

    Example:
        >>> levels(np.array([0, 1, 2, 4, 5, 17, 64, 65, -1]))
        array([0, 1, 2, 2, 3, 4, 4, 5, 6])
    """
    return np.where(counts < 0, len(_HIGHEST) + 1, np.searchsorted(np.array(_HIGHEST), counts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharing:
    """Statistics of the tokens of a text in one key/value head, by level.

    Attributes:
        num_tokens: Number of tokens of each level, as in `LEVEL_NAMES`.
        kept: Mean of `LayerMemory.kept` over the tokens of each level; None if there are none.
        num_open: Number of slots in use at the end.
    """

    num_tokens: tuple[int, ...]
    kept: tuple[float | None, ...]
    num_open: int

    @property
    def exact_share(self) -> float:
        """Share of the tokens that are exact or alone in a slot."""
        return sum(self.num_tokens[:2]) / max(1, sum(self.num_tokens))

    @property
    def kept_share(self) -> float:
        """Mean of `LayerMemory.kept` over all tokens."""
        pairs = zip(self.num_tokens, self.kept, strict=True)
        return sum(n * kept for n, kept in pairs if kept is not None) / max(1, sum(self.num_tokens))


def sharing(memory: LayerMemory, kv_head: int) -> Sharing:
    """Statistics of the tokens of a text in one key/value head of a layer."""
    level = levels(memory.counts()[kv_head])
    kept = memory.kept[kv_head]
    slots = memory.final_slots[kv_head]
    of_level = [kept[level == i] for i in range(len(LEVEL_NAMES))]
    return Sharing(
        num_tokens=tuple(len(x) for x in of_level),
        kept=tuple(float(x.mean()) if len(x) else None for x in of_level),
        num_open=len(np.unique(slots[slots >= 0])),
    )
