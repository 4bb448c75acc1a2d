"""`Options`: the settings that define what the layer computes, passed to every backend."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence

from ovq.fields import is_finite
from ovq.ops.schedule import GROWTHS

# Scores that differ by less than this, relative to the lengths of the vectors, count as equal. Adding a
# float64 sum in another order changes it by a hundredth of this, so repeated keys tie in every backend.
TIE = 1e-12
# Smallest length that is divided by: a vector of length 0 then has cosine 0 with every other.
TINY = 1e-30
# The least weight with which a token is read in its own chunk, where it is read with its weight, so that no
# query has nothing to read: less than slots have that are all but forgotten, and still a float32.
LEAST_READ = 1e-37
# Between these lengths, float32 products of two vectors neither vanish nor overflow. Where a key or the mean
# of a slot is shorter or longer, but not zero, routing uses float64 from the start.
ORDINARY = (1e-15, 1e15)
# Stands for the cosine of a key that is not finite. Cosines are at most 1, so it is the last to open a slot.
NO_COSINE = 2.0
# Stands for the cosine of a key of weight 0, which comes after those.
NO_WEIGHT = 3.0
# Stands for a squared distance that is not finite, relative to the largest squared length of a point.
# Distances are at most 4 times that.
NO_DISTANCE = 5.0
# The power of a b / (a + b) by which the distance of two items of masses a and b counts where the shortest
# edges are taken (docs/results/rules.md), and for the weights of expected use (docs/results/convert.md).
MASS_POWER = 1 / 3
# In how many parts they are taken, each but the last half of what is due, rounded up.
NUM_PARTS = 4

# w of the rules that merge pairs, for keys of length 1. The best value depends on the weights of a model;
# this one is good for all models that were measured (docs/results/rules.md).
VALUE_WEIGHT = 0.35

INITS = ("novelty", "random")
# The rules that merge the cheapest pair of slots and tokens, one after the other, with p, the power of
# c_a c_b / (c_a + c_b) in their costs: 1 is the likelihood's; with less, the counts of two items matter less.
# They are theory: the reference alone knows them.
COUNT_POWERS = {"ward": 1.0, "ward-sqrt": 0.5}
# All rules that merge pairs: these, and the one that takes the shortest edges to nearest items, all at once.
PAIR_MERGES = (*COUNT_POWERS, "nearest")
MERGES = ("existing", "updated", *PAIR_MERGES)
# The rules that layers, models and commands know, see `current_merge`.
CURRENT_MERGES = ("existing", "updated", "nearest")
# The rule by which trained models recall most, whichever one they were trained by (docs/results/rules.md).
BEST_MERGE = "nearest"
BIASES = ("count", "count+norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The settings that, together with its tensors, define the layer: no backend may change them.

    Attributes:
        num_slots: N, the largest number of slots per head.
        chunk_size: C, tokens per chunk.
        growth: the schedule, `"plateau"`, `"linear"` or `"immediate"`.
        init: which keys open slots, `"novelty"` or `"random"`.
        merge: where the other keys go, `"existing"` or `"updated"` slots; or a rule of `PAIR_MERGES`, which
            merges pairs of slots and tokens.
        seed: seeds `init="random"`.
        bias: what is added to the scores of slots, `"count"` (log c) or `"count+norm"`.
        rate: how far a slot mean moves to a key merged into it: `"count"` (1 / count) or a constant share.
        value_weight: w, the weight of distances between values relative to those between keys where pairs
            are merged.
        mass_power: the power of masses in what edges are ranked by, see `MASS_POWER`.
        weighs_chunk: whether tokens of the own chunk are read with the log of their weights, as slots are.
    """

    num_slots: int
    chunk_size: int
    growth: str
    init: str
    merge: str
    seed: int
    bias: str = "count"
    rate: float | str = "count"
    value_weight: float = VALUE_WEIGHT
    mass_power: float = MASS_POWER
    weighs_chunk: bool = False

    def __post_init__(self) -> None:
        options = (("growth", GROWTHS), ("init", INITS), ("merge", MERGES), ("bias", BIASES))
        for name, choices in options:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, found {getattr(self, name)!r}")
        check_sizes(1, num_slots=self.num_slots, chunk_size=self.chunk_size)
        check_rate("rate", self.rate)
        check_value_weight("value_weight", self.value_weight)
        # Where pairs are merged, no key is chosen to open a slot, and no mean moves by steps.
        for name, only in (("init", "novelty"), ("rate", "count")):
            if self.merges_pairs and getattr(self, name) != only:
                raise ValueError(
                    f"{name}: expected {only!r} with merge {self.merge!r}, found {getattr(self, name)!r}"
                )

    @property
    def merges_pairs(self) -> bool:
        """Whether pairs of slots and tokens are merged, instead of keys into slots."""
        return self.merge in PAIR_MERGES

    @property
    def count_power(self) -> float:
        """The power of c_a c_b / (c_a + c_b) in the cost of merging two items, by a rule that has costs."""
        return COUNT_POWERS[self.merge]


def unlisted(options: Options, listed: Mapping[str, Sequence[str]]) -> str | None:
    """Why a backend that knows only some values of options cannot take these; None if it can.

    So a value that is new elsewhere is refused, where it would otherwise be taken for another.

    Args:
        options: the settings of a call.
        listed: the values that the backend knows, by option; `"number"` stands for all numbers.

    Example:
        >>> options = Options(
        ...     num_slots=8, chunk_size=4, growth="plateau", init="novelty", merge="existing", seed=0
        ... )
        >>> unlisted(options, {"rate": ("count",), "merge": ("updated", "nearest")})
        "expected merge to be one of ('updated', 'nearest'), found 'existing'"
    """
    for name, known in listed.items():
        found = getattr(options, name)
        if ("number" if isinstance(found, int | float) else found) not in known:
            expected = repr(known[0]) if len(known) == 1 else f"to be one of {known}"
            return f"expected {name} {expected}, found {found!r}"
    return None


def can_merge_best(merge: str, *, init: str, rate: float | str) -> bool:
    """Whether a dictionary kept by `merge` and these options can be kept by `BEST_MERGE` in its place.

    Example:
        >>> can_merge_best("existing", init="novelty", rate="count")
        True
        >>> can_merge_best("nearest", init="novelty", rate="count")
        False
    """
    return merge != BEST_MERGE and init == "novelty" and rate == "count"


def current_merge(merge: str) -> str:
    """The rule that runs where `merge` was saved or asked for; if it is another, a warning says so, once.

    Earlier versions ran `COUNT_POWERS` in every backend. All that is above the op takes these names still.

    Example:
        >>> current_merge("existing"), current_merge("nearest")
        ('existing', 'nearest')
    """
    # What is no name at all is refused elsewhere.
    if merge not in tuple(COUNT_POWERS):
        return merge
    _warn_of_earlier_rule(merge)
    return BEST_MERGE


@functools.cache
def _warn_of_earlier_rule(merge: str) -> None:
    warnings.warn(
        f"merge: found {merge!r}, which the reference backend of the op alone still has; {BEST_MERGE!r} runs "
        "in its place: it recalls as much and takes a fraction of the time",
        FutureWarning,
        stacklevel=3,
    )


def default_growth(merge: str) -> str:
    """The growth that a merge rule is meant for: where pairs are merged, none is while there is room."""
    return "immediate" if merge in PAIR_MERGES else "plateau"


def check_sizes(least: int, **sizes: int) -> None:
    """Raise ValueError, naming the first that is wrong, unless all are integers of at least `least`.

    Example:
        >>> check_sizes(1, num_slots=8, chunk_size=0)
        Traceback (most recent call last):
        ValueError: chunk_size: expected an integer of at least 1, found 0
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, found {size!r}")


def check_value_weight(name: str, weight: float) -> None:
    """Raise ValueError, naming the argument `name`, unless `weight` is a finite number of at least 0."""
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not (is_number and is_finite(weight) and weight >= 0):
        raise ValueError(f"{name}: expected a finite number of at least 0, found {weight!r}")


def check_rate(name: str, rate: float | str) -> None:
    """Raise ValueError, naming the argument `name`, unless `rate` is `"count"` or a number in (0, 1]."""
    is_share = isinstance(rate, (int, float)) and not isinstance(rate, bool) and 0 < rate <= 1
    if rate != "count" and not is_share:
        raise ValueError(f"{name}: expected 'count' or a number in (0, 1], found {rate!r}")
