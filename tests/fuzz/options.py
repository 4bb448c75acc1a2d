"""Options of the op: what programs on it have in common, and options drawn so that they fit each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from random import Random

from ovq.ops.ablation import BIASES
from ovq.ops.options import CURRENT_MERGES, INITS, VALUE_WEIGHT
from tests.fuzz.program import Program

#: `value_weight` of the rules that merge pairs; the default more often than others.
VALUE_WEIGHTS = (0.0, 0.35, 0.35, 2.0)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class OpProgram(Program):
    """A program on tokens of one kind and with one dictionary.

    Attributes:
        dtype: of q, k and v.
        num_kv_heads: key/value heads.
        group: query heads of each.
        key_dim, value_dim: sizes of a head.
        num_slots, chunk_size, growth, init, merge, bias, rate, value_weight: of the op.
        weights: of tokens, "none" or one of `WEIGHTS`.
        forgetting: of tokens, "none" or one of `LOGS`.
    """

    dtype: str = "float64"
    num_kv_heads: int = 1
    group: int = 1
    key_dim: int = 1
    value_dim: int = 1
    num_slots: int = 1
    chunk_size: int = 1
    growth: str = "plateau"
    init: str = "novelty"
    merge: str = "existing"
    bias: str = "count"
    rate: float | str = "count"
    value_weight: float = VALUE_WEIGHT
    weights: str = "none"
    forgetting: str = "none"


def drawn_options(rng: Random, rates: Sequence[float | str]) -> dict[str, float | str]:
    """`init`, `merge`, `bias`, `rate` and `value_weight` of the op."""
    options = {
        "init": rng.choice(INITS),
        "merge": rng.choice(CURRENT_MERGES),
        "bias": rng.choice(BIASES),
        "rate": rng.choice(rates),
        "value_weight": rng.choice(VALUE_WEIGHTS),
    }
    # Where pairs are merged nothing opens a slot by chance and no mean moves by steps.
    return options | {"init": "novelty", "rate": "count"} if options["merge"] == "nearest" else options
