"""`Options`: the settings that define what the layer computes, passed to every backend."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import torch

from ovq.fields import did_you_mean, is_finite
from ovq.ops.ablation import Ablation
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


@dataclasses.dataclass(frozen=True)
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
        ablation: what is changed for an ablation.
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
    # Made anew, as graphs of PyTorch 2.11 cannot take one that is made before.
    ablation: Ablation = dataclasses.field(default_factory=Ablation)
    value_weight: float = VALUE_WEIGHT
    mass_power: float = MASS_POWER
    weighs_chunk: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("growth", GROWTHS), ("init", INITS), ("merge", MERGES)):
            if (found := getattr(self, name)) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, found {found!r}"
                    f"{did_you_mean(str(found), choices)}"
                )
        check_sizes(1, num_slots=self.num_slots, chunk_size=self.chunk_size)
        check_value_weight("value_weight", self.value_weight)
        # Where pairs are merged, no key is chosen to open a slot, and no mean moves by steps.
        for name, found, only in (("init", self.init, "novelty"), ("rate", self.ablation.rate, "count")):
            if self.merges_pairs and found != only:
                raise ValueError(f"{name}: expected {only!r} with merge {self.merge!r}, found {found!r}")

    @property
    def schedule(self) -> dict[str, Any]:
        """The options by which the number of slots grows, as `ovq.ops.schedule` takes them."""
        return {"num_slots": self.num_slots, "chunk_size": self.chunk_size, "growth": self.growth}

    @property
    def merges_pairs(self) -> bool:
        """Whether pairs of slots and tokens are merged, instead of keys into slots."""
        return self.merge in PAIR_MERGES

    @property
    def count_power(self) -> float:
        """The power of c_a c_b / (c_a + c_b) in the cost of merging two items, by a rule that has costs."""
        return COUNT_POWERS[self.merge]


def options_of(
    *,
    num_slots: int,
    chunk_size: int,
    growth: str | None,
    init: str,
    merge: str,
    ablation: Ablation,
    value_weight: float,
    seed: int,
) -> Options:
    """`Options` with these fields, with the growth that `merge` is meant for if it is None.

    Of equal fields these are the same object, which is checked once, and recognized in no time.
    """
    growth = default_growth(merge) if growth is None else growth
    # In the order of `Options`.
    fields = (num_slots, chunk_size, growth, init, merge, seed, ablation, value_weight)
    # In a graph that is being made nothing can be looked up.
    if torch.compiler.is_compiling():
        return Options(*fields)
    try:
        return _known_options(*fields)
    except TypeError:
        # What is no value of any option cannot be looked up either: it is refused.
        return Options(*fields)


# By type, because 1 is equal to True, which is no size.
_known_options = functools.lru_cache(maxsize=256, typed=True)(Options)


@functools.lru_cache(maxsize=256)
def weighing_chunk(options: Options) -> Options:
    """The options by which tokens of the own chunk are read with their weights; likewise the same object."""
    return dataclasses.replace(options, weighs_chunk=True)


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
