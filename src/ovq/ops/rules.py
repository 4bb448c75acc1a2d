"""`Rules`: the settings that define what the layer computes, passed to every backend."""

import dataclasses

from ovq.ops.schedule import GROWTHS

# Scores closer than this, relative to the lengths of the vectors, are equal: float64 sums taken in another
# order differ by a hundredth of it. It makes ties of repeated keys ties in every backend.
TIE = 1e-12
# What lengths are clamped to before a division: a vector of length 0 has cosine 0 with everything.
TINY = 1e-30
# Between these lengths float32 products of two vectors neither vanish nor overflow. Where a key or the mean
# of a slot is shorter or longer, but not zero, routing takes float64 from the start.
ORDINARY = (1e-15, 1e15)
# The rank of a key that is not finite, so has no cosine. Those are at most 1: it is the last to open a slot.
NO_COSINE = 2.0

INITS = ("novelty", "random")
MERGES = ("existing", "updated")
BIASES = ("count", "count+norm")


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
        bias: what is added to the scores of slots, `"count"` (log c) or `"count+norm"`.
        rate: how far a slot mean moves to a key merged into it: `"count"` (1 / count) or a constant share.
    """

    num_slots: int
    chunk_size: int
    growth: str
    init: str
    merge: str
    seed: int
    bias: str = "count"
    rate: float | str = "count"

    def __post_init__(self) -> None:
        options = (("growth", GROWTHS), ("init", INITS), ("merge", MERGES), ("bias", BIASES))
        for name, choices in options:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, found {getattr(self, name)!r}")
        for name in ("num_slots", "chunk_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, found {value!r}")
        check_rate("rate", self.rate)


def check_rate(name: str, rate: float | str) -> None:
    """Raise ValueError, naming the argument `name`, unless `rate` is `"count"` or a number in (0, 1]."""
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if rate != "count" and not (is_number and 0 < rate <= 1):
        raise ValueError(f"{name}: expected 'count' or a number in (0, 1], found {rate!r}")
