"""How well dictionaries of slots regress values on keys: `python benchmarks/mixture_regression.py --out DIR`.

Compares one pass online, as an OVQ layer learns, with expectation-maximisation and scikit-learn, which see
all the data at once and many times. `docs/results/memory.md` has the figure. Takes minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from ovq.gmr import GaussianMixtureRegressor
from ovq.plots.panels import new_panels, save
from ovq.plots.style import MIXER_STYLES, PALETTE
from ovq.runtime.files import write_atomic

SLOTS, CHUNK = (16, 64, 256), 32
TRAIN, HELD_OUT = 2048, 512
ERROR_TICKS = (0.05, 0.1, 0.2, 0.4)
PRECISIONS = (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)

Array = np.ndarray
Predict = Callable[[Array], Array]


def _unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def smooth_values(keys: Array, rng: np.random.Generator) -> Array:
    """A smooth function of the keys, four components, with a little noise."""
    weights = 2 * rng.normal(size=(keys.shape[1], 4))
    return np.tanh(keys @ weights) + 0.05 * rng.normal(size=(len(keys), 4))


def uniform(rng: np.random.Generator, num: int) -> Array:
    """Keys without structure, on the sphere in 6 dimensions."""
    return _unit(rng.normal(size=(num, 6)))


def clustered(rng: np.random.Generator, num: int, *, is_drifting: bool = False) -> Array:
    """Keys around 40 centres in 16 dimensions, in random order or one centre after the other."""
    centres = _unit(rng.normal(size=(40, 16)))
    labels = rng.integers(40, size=num)
    if is_drifting:
        labels.sort()
    return _unit(centres[labels] + 0.12 * rng.normal(size=(num, 16)))


def drifting(rng: np.random.Generator, num: int) -> Array:
    """The clustered keys, one centre after the other, so that no centre comes back."""
    return clustered(rng, num, is_drifting=True)


STREAMS = {"uniform keys": uniform, "clustered keys": clustered, "clustered, one after the other": drifting}


def _regressors(**options) -> Iterator[Predict]:
    """One regressor for each precision, to choose from."""
    fit, bias = options.pop("fit"), options.pop("bias", "count+norm")
    keys, values = options.pop("data")
    for precision in PRECISIONS:
        model = GaussianMixtureRegressor(chunk_size=CHUNK, precision=precision, bias=bias, **options)
        yield getattr(model, fit)(keys, values).predict


def _conditional_mean(means: Array, weights: Array, covariances: Array, values: Array) -> Predict:
    """E[value | key] under a mixture of scikit-learn over keys, given the mean value of each component."""
    mixture = GaussianMixture(len(means), covariance_type="spherical")
    mixture.means_, mixture.weights_, mixture.covariances_ = means, weights, covariances
    mixture.precisions_cholesky_ = covariances**-0.5
    return lambda queries: mixture.predict_proba(queries) @ values


def _mini_batch_k_means(keys: Array, values: Array, num_slots: int, seed: int) -> Iterator[Predict]:
    """scikit-learn's online k-means over the keys, and the mean value of each of its clusters."""
    clusters = MiniBatchKMeans(num_slots, batch_size=CHUNK, n_init=1, random_state=seed).fit(keys)
    members = np.eye(num_slots)[clusters.predict(keys)]
    is_used = members.sum(0) > 0
    members, count = members[:, is_used], members.sum(0)[is_used]
    for precision in PRECISIONS:
        yield _conditional_mean(
            clusters.cluster_centers_[is_used],
            count / count.sum(),
            np.full(len(count), 1 / precision),
            members.T @ values / count[:, None],
        )


def _gaussian_mixture(keys: Array, values: Array, num_slots: int, seed: int) -> Iterator[Predict]:
    """scikit-learn's mixture over (key, value), which estimates a variance for each component."""
    mixture = GaussianMixture(num_slots, covariance_type="spherical", random_state=seed, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(np.hstack([keys, values]))
    means, mean_values = np.hsplit(mixture.means_, [keys.shape[1]])
    yield _conditional_mean(means, mixture.weights_, mixture.covariances_, mean_values)


def contenders(keys: Array, values: Array, num_slots: int, seed: int) -> dict[str, Iterator[Predict]]:
    """Every way to fill `num_slots` slots, as regressors to choose from on held-out data."""
    own = {"data": (keys, values), "num_slots": num_slots, "random_state": seed}
    return {
        "one pass, hard (OVQ)": _regressors(fit="partial_fit", **own),
        "the same, read without the norm term": _regressors(fit="partial_fit", bias="count", **own),
        "one pass, soft": _regressors(fit="partial_fit", assignment="soft", **own),
        "EM, hard": _regressors(fit="fit", **own),
        "EM, soft": _regressors(fit="fit", assignment="soft", max_iter=30, **own),
        "scikit-learn MiniBatchKMeans": _mini_batch_k_means(keys, values, num_slots, seed),
        "scikit-learn GaussianMixture": _gaussian_mixture(keys, values, num_slots, seed),
        "every token a slot": _regressors(
            fit="partial_fit", growth="immediate", **{**own, "num_slots": len(keys)}
        ),
    }


def measure(seeds: int) -> list[dict]:
    """One row for each stream, seed, number of slots and contender."""
    rows = []
    cases = [(name, seed, n) for name in STREAMS for seed in range(seeds) for n in SLOTS]
    for name, seed, num_slots in track(cases, "regression", console=Console(stderr=True)):
        rng = np.random.default_rng(seed)
        keys = STREAMS[name](rng, TRAIN + 2 * HELD_OUT)
        values = smooth_values(keys, rng)
        # Held-out keys are drawn from the whole stream.
        order = np.sort(rng.permutation(len(keys))[:TRAIN])
        others = rng.permutation(np.setdiff1d(np.arange(len(keys)), order))
        choose, test = others[:HELD_OUT], others[HELD_OUT:]
        for label, regressors in contenders(keys[order], values[order], num_slots, seed).items():
            best = min(
                regressors, key=lambda predict: share_of_variance(predict(keys[choose]), values[choose])
            )
            error = share_of_variance(best(keys[test]), values[test])
            rows.append(
                {"stream": name, "seed": seed, "num_slots": num_slots, "method": label, "error": error}
            )
    return rows


def share_of_variance(found: Array, expected: Array) -> float:
    """Squared error as a share of the variance, 1 - R^2."""
    return float(np.square(found - expected).sum() / np.square(expected - expected.mean(0)).sum())


def _by_seed(rows: list[dict], stream: str, method: str) -> Array:
    """Errors `[seeds, slots]`."""
    found = [r["error"] for r in rows if r["stream"] == stream and r["method"] == method]
    return np.reshape(found, (-1, len(SLOTS)))


def draw(rows: list[dict], path: Path) -> None:
    """Draw one panel for each kind of stream: error against slots, mean and range over seeds."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    # Only the first method is that of a mixer.
    styles = (MIXER_STYLES["ovq"], *PALETTE[1:])
    figure, panels = new_panels(len(STREAMS))
    errors = [row["error"] for row in rows]
    ylim = (min(errors) / 1.2, max(errors) * 1.2)
    for axes, stream in zip(panels, STREAMS, strict=True):
        for i, (method, style) in enumerate(zip(methods, styles, strict=True)):
            errors = _by_seed(rows, stream, method)
            mean = errors.mean(0)
            # Shifted, so that bars at the same number of slots do not cover each other.
            places = np.array(SLOTS) * 1.05 ** (i - len(methods) / 2)
            spread = np.abs(np.stack([errors.min(0), errors.max(0)]) - mean)
            axes.errorbar(places, mean, spread, label=method, capsize=2, **style.options())
        axes.set(xscale="log", yscale="log", title=stream, xlabel="slots", ylim=ylim)
        axes.set_xticks(SLOTS, [str(n) for n in SLOTS])
        axes.set_yticks(ERROR_TICKS, [str(error) for error in ERROR_TICKS])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
    figure.supylabel("error on held-out keys (share of the variance)", fontsize=10)
    save(figure, path)


def main() -> None:
    """Measure, write `mixture_regression.json` and `.png`, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the figure and the rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="draw the rows that are in the folder, and end")
    arguments = parser.parse_args()
    path = arguments.out / "mixture_regression.json"
    if arguments.draw:
        draw(json.loads(path.read_text()), path.with_suffix(".png"))
        return
    rows = measure(arguments.seeds)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(rows, indent=1) + "\n")
    draw(rows, arguments.out / "mixture_regression.png")
    for stream in STREAMS:
        table = Table(stream, *(f"{n} slots" for n in SLOTS))
        for method in dict.fromkeys(row["method"] for row in rows):
            table.add_row(method, *(f"{error:.3f}" for error in _by_seed(rows, stream, method).mean(0)))
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
