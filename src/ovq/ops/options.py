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

# Scores that differ by less than this, relative to the lengths of the vectors, count as equal. The order of
# summation changes a float64 sum by a hundredth of this, so repeated keys tie in every backend.
TIE = 1e-12
# Minimum length in a cosine: a zero vector then has cosine 0 with every other.
TINY = 1e-30
# Minimum weight of a token read in its own chunk with its weight, so that every query has something to read.
# It is below the weight of almost forgotten slots and still representable in float32.
LEAST_READ = 1e-37
# Between these lengths, float32 products of two vectors neither underflow nor overflow. If a key or slot mean
# is shorter (but not zero) or longer, routing uses float64 from the start.
ORDINARY = (1e-15, 1e15)
# Replaces the cosine of a non-finite key. Cosines are at most 1, so such a key is last to open a slot.
NO_COSINE = 2.0
# Replaces the cosine of a key of weight 0, which comes after non-finite keys.
NO_WEIGHT = 3.0
# Replaces a non-finite squared distance. Distances are relative to the largest squared length of a point, so
# finite ones are at most 4.
NO_DISTANCE = 5.0
# The priority of an edge (merge="nearest") is its squared distance times (a b / (a + b)) to this power, for
# items of masses a and b (docs/results/rules.md). Converted models use 1 (docs/results/convert.md).
MASS_POWER = 1 / 3
# Number of parts in which the shortest edges are merged; each but the last makes half of the merges that are
# still due, rounded up.
NUM_PARTS = 4

# Default of w in the rules that merge pairs, for keys of length 1. The best value depends on the trained
# model; this one is good for all models measured (docs/results/rules.md).
VALUE_WEIGHT = 0.35

INITS = ("novelty", "random")
# The rules of greedy merging, cheapest pair first, each with the power of c_a c_b / (c_a + c_b) in its cost.
# Power 1 is the growth of the likelihood loss; counts matter less with lower powers. Only the reference
# backend runs these rules.
COUNT_POWERS = {"ward": 1.0, "ward-sqrt": 0.5}
# All rules that merge pairs: the greedy rules, and the rule that merges along shortest edges.
PAIR_MERGES = (*COUNT_POWERS, "nearest")
MERGES = ("existing", "updated", *PAIR_MERGES)
# The rules that layers, models and commands support, see `current_merge`.
CURRENT_MERGES = ("existing", "updated", "nearest")
# The rule with the best recall at inference, whichever rule a model was trained with (docs/results/rules.md).
BEST_MERGE = "nearest"


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings that, together with its tensors, define the layer: no backend may change them.

    Attributes:
        num_slots: N, the maximum number of slots per head.
        chunk_size: C, tokens per chunk.
        growth: schedule of the number of slots, `"plateau"`, `"linear"` or `"immediate"`.
        init: which keys open slots, `"novelty"` or `"random"`.
        merge: update rule of the dictionary: `"existing"`, `"updated"`, or a rule of `PAIR_MERGES`, which
            merges pairs of slots and tokens.
        seed: seed of `init="random"`.
        ablation: changes for ablations.
        value_weight: w, the weight of values relative to keys in the distances of rules that merge pairs.
        mass_power: power of the masses in the priority of edges, see `MASS_POWER`.
        weighs_chunk: whether there is forgetting: tokens of the own chunk are then read with the log of their
            weights, as slots are.
        state_dtype: format that the sums, with forgetting the means, are rounded to after each chunk, see
            `narrow.py`.
    """

    num_slots: int
    chunk_size: int
    growth: str
    init: str
    merge: str
    seed: int
    # A new object each time: `torch.compile` of PyTorch 2.11 cannot use one from outside the graph.
    ablation: Ablation = dataclasses.field(default_factory=Ablation)
    value_weight: float = VALUE_WEIGHT
    mass_power: float = MASS_POWER
    weighs_chunk: bool = False
    state_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, choices in (("growth", GROWTHS), ("init", INITS), ("merge", MERGES)):
            if (found := getattr(self, name)) not in choices:
                raise ValueError(
                    f"{name}: expected one of {', '.join(choices)}, found {found!r}"
                    f"{did_you_mean(str(found), choices)}"
                )
        check_sizes(1, num_slots=self.num_slots, chunk_size=self.chunk_size)
        check_value_weight("value_weight", self.value_weight)
        # Rules that merge pairs choose no keys to open slots and have no step size.
        for name, found, only in (("init", self.init, "novelty"), ("rate", self.ablation.rate, "count")):
            if self.merges_pairs and found != only:
                raise ValueError(f"{name}: expected {only!r} with merge {self.merge!r}, found {found!r}")

    @property
    def schedule(self) -> dict[str, Any]:
        """Keyword arguments for the functions of `ovq.ops.schedule`."""
        return {"num_slots": self.num_slots, "chunk_size": self.chunk_size, "growth": self.growth}

    @property
    def merges_pairs(self) -> bool:
        """Whether the rule merges pairs of slots and tokens, instead of keys into slots."""
        return self.merge in PAIR_MERGES


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
    """`Options` with these fields; if `growth` is None, the default growth of `merge`.

    Equal fields give the same cached object, so that it is checked once and compared by identity.
    """
    growth = default_growth(merge) if growth is None else growth
    # In the field order of `Options`.
    fields = (num_slots, chunk_size, growth, init, merge, seed, ablation, value_weight)
    # The cache cannot be used while `torch.compile` traces.
    if torch.compiler.is_compiling():
        return Options(*fields)
    try:
        return _known_options(*fields)
    except TypeError:
        # An unhashable value is not valid for any option: this raises the error that says so.
        return Options(*fields)


# Typed, because 1 equals True, which is not a valid size.
_known_options = functools.lru_cache(maxsize=256, typed=True)(Options)


def rounding_sums(options: Options, state_dtype: str) -> Options:
    """`options` with this format of the sums, cached as in `options_of`."""
    return options if options.state_dtype == state_dtype else _rounding_sums(options, state_dtype)


@functools.lru_cache(maxsize=256)
def _rounding_sums(options: Options, state_dtype: str) -> Options:
    return dataclasses.replace(options, state_dtype=state_dtype)


@functools.lru_cache(maxsize=256)
def weighing_chunk(options: Options) -> Options:
    """`options` with `weighs_chunk=True`, cached as in `options_of`."""
    return dataclasses.replace(options, weighs_chunk=True)


def can_merge_best(merge: str, *, init: str, rate: float | str) -> bool:
    """Whether a dictionary with these options does not yet use `BEST_MERGE` but can switch to it.

    Example:
        >>> can_merge_best("existing", init="novelty", rate="count")
        True
        >>> can_merge_best("nearest", init="novelty", rate="count")
        False
    """
    return merge != BEST_MERGE and init == "novelty" and rate == "count"


def current_merge(merge: str) -> str:
    """The rule that runs for `merge`, which may come from an old file; warns once if it is a different one.

    Earlier versions ran the rules of `COUNT_POWERS` in every backend; layers and models still accept them.

    Example:
        >>> current_merge("existing"), current_merge("nearest")
        ('existing', 'nearest')
    """
    # Unknown names are refused elsewhere.
    if merge not in tuple(COUNT_POWERS):
        return merge
    _warn_of_earlier_rule(merge)
    return BEST_MERGE


@functools.cache
def _warn_of_earlier_rule(merge: str) -> None:
    warnings.warn(
        f"merge: found {merge!r}, which only the reference backend of the op still supports; {BEST_MERGE!r} "
        "runs in its place: it recalls as much and takes a fraction of the time",
        FutureWarning,
        stacklevel=3,
    )


def default_growth(merge: str) -> str:
    """Default growth of a merge rule; rules that merge pairs merge nothing while there is room."""
    return "immediate" if merge in PAIR_MERGES else "plateau"


def check_sizes(least: int, **sizes: int) -> None:
    """Raise ValueError, naming the first invalid size, unless all are integers of at least `least`.

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
