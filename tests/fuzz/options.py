"""Options of the dictionary, drawn so that they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ovq.ops.ablation import BIASES
from ovq.ops.options import CURRENT_MERGES, INITS

#: `value_weight` of the rules that merge pairs; the default more often than others.
VALUE_WEIGHTS = (0.0, 0.35, 0.35, 2.0)


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
