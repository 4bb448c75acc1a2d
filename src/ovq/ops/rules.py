"""`Rules`: the settings that define what the layer computes, passed to every backend."""

import dataclasses

from ovq.ops.schedule import GROWTHS

# Scores closer than this, relative to the lengths of the vectors, are equal: float64 sums taken in another
# order differ by a hundredth of it. It makes ties of repeated keys ties in every backend.
TIE = 1e-12

INITS = ("novelty", "random")
MERGES = ("existing", "updated")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """The choices that define the layer, beside its tensors: what a backend must not change.

    Attributes:
        num_slots: the bound N on the slots of a head.
        chunk_size: C, tokens of a chunk.
        growth: the schedule, `"plateau"`, `"linear"` or `"immediate"`.
        init: which keys open slots, `"novelty"` or `"random"`.
        merge: where the others go, `"existing"` or `"updated"` slots.
        seed: seeds `init="random"`.
    """

    num_slots: int
    chunk_size: int
    growth: str
    init: str
    merge: str
    seed: int

    def __post_init__(self) -> None:
        for name, choices in (("growth", GROWTHS), ("init", INITS), ("merge", MERGES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, found {getattr(self, name)!r}")
        for name in ("num_slots", "chunk_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, found {value!r}")
