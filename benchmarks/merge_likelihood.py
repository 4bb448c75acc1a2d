"""How well merge rules fit what they have seen: `python benchmarks/merge_likelihood.py --out DIR`.

The rule of the paper and Ward's rule in one pass, beside Ward's rule and expectation-maximisation on all the
data at once, on the streams of `mixture_regression.py`. `docs/results/memory.md` has the table.
Minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mixture_regression import CHUNK, HELD_OUT, PRECISIONS, STREAMS, TRAIN, share_of_variance, smooth_values
from ovq.gmr import GaussianMixtureRegressor
from ovq.runtime.files import write_atomic

SLOTS = 64
# w, with which values are scaled for all methods alike.
VALUE_WEIGHT = 0.5
WARD = {"merge": "ward", "value_weight": VALUE_WEIGHT}
ONLINE = {"chunk_size": CHUNK}
METHODS = {
    "paper's rule, one pass": ("partial_fit", ONLINE),
    "the same, growth immediate": ("partial_fit", {**ONLINE, "growth": "immediate"}),
    "Ward, one pass, keys alone (w = 0)": ("partial_fit", {**ONLINE, "merge": "ward", "value_weight": 0.0}),
    "Ward, one pass": ("partial_fit", {**ONLINE, **WARD}),
    "Ward, one pass, chunks of 256": ("partial_fit", {**WARD, "chunk_size": 256}),
    "Ward, all tokens in one chunk": ("partial_fit", {**WARD, "chunk_size": TRAIN}),
    "EM, hard": ("fit", {}),
    "EM, soft": ("fit", {"assignment": "soft", "max_iter": 30}),
}
MEASURES = ("squared_error", "log_likelihood", "error")

Array = np.ndarray
Pairs = tuple[Array, Array]


def squared_error(model: GaussianMixtureRegressor, keys: Array, values: Array) -> float:
    """Squared distance of a token from the means of its slots, on average over all that were learned."""
    points, sums = np.hstack([keys, values]), np.hstack([model.key_sum_, model.value_sum_])
    return float((np.square(points).sum() - (np.square(sums).sum(1) / model.count_).sum()) / len(points))


def measured(fit: str, options: dict, seen: Pairs, choose: Pairs, test: Pairs, seed: int) -> dict[str, float]:
    """What a method reaches, at the precision that is best for it on the pairs `choose`."""
    model = GaussianMixtureRegressor(SLOTS, random_state=seed, **options)
    found = []
    for precision in PRECISIONS:
        model.set_params(precision=precision)
        # What soft assignment learns depends on the precision, and nothing else does.
        if not found or model.assignment == "soft":
            getattr(model, fit)(*seen)
        chosen, tested = (
            (model.log_density(*pairs).mean(), share_of_variance(model.predict(pairs[0]), pairs[1]))
            for pairs in (choose, test)
        )
        found.append((*chosen, *tested, squared_error(model, *seen)))
    likeliest, best = max(found), min(found, key=lambda each: each[1])
    return dict(zip(MEASURES, (likeliest[4], likeliest[2], best[3]), strict=True))


def measure(seeds: int) -> list[dict]:
    """A row for each stream, seed and method."""
    rows = []
    cases = [(name, seed) for name in STREAMS for seed in range(seeds)]
    for name, seed in track(cases, "merge rules", console=Console(stderr=True)):
        rng = np.random.default_rng(seed)
        keys = STREAMS[name](rng, TRAIN + 2 * HELD_OUT)
        values = smooth_values(keys, rng)
        # As long as Ward's rule makes them: then it and EM lower the same squared error.
        values *= VALUE_WEIGHT / np.square(values).sum(1).mean() ** 0.5
        order = np.sort(rng.permutation(len(keys))[:TRAIN])
        others = rng.permutation(np.setdiff1d(np.arange(len(keys)), order))
        pairs = [(keys[part], values[part]) for part in (order, others[:HELD_OUT], others[HELD_OUT:])]
        for method, (fit, options) in METHODS.items():
            found = measured(fit, options, *pairs, seed)
            rows.append({"stream": name, "seed": seed, "method": method, **found})
    return rows


def main() -> None:
    """Measure, write `merge_likelihood.json`, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows = measure(arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.out / "merge_likelihood.json", json.dumps(rows, indent=1) + "\n")
    for stream in STREAMS:
        table = Table(stream, *MEASURES)
        for method in METHODS:
            found = [row for row in rows if (row["stream"], row["method"]) == (stream, method)]
            table.add_row(method, *(f"{np.mean([row[m] for row in found]):.3f}" for m in MEASURES))
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
