"""The theory of OVQ as a scikit-learn estimator: regression by a Gaussian mixture that is learned online.

The pairs (key, value) of a stream are modelled by a mixture with weights c_n / t, means (D_k[n], D_v[n]) and
covariance I / b. An OVQ layer reads the conditional mean of this mixture given a query, and learns the
mixture online by hard assignment (`docs/method/math.md`, sections 3 and 5; `tests/test_gmr.py` and
`tests/test_gmr_ward.py` show both).

This is plain NumPy in float64, written independently of the op, so that each checks the other. Only this part
of the package needs scikit-learn: `pip install './lab[theory]'`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ovq.ops.ablation import BIASES
from ovq.ops.options import PAIR_MERGES, VALUE_WEIGHT, check_value_weight, default_growth
from ovq.ops.schedule import GROWTHS, grown_slots
from ovq_lab.gmr.nearest import nearest_clusters
from ovq_lab.gmr.ward import ward_clusters

try:
    from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
    from sklearn.cluster import kmeans_plusplus
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "ovq_lab.gmr: expected scikit-learn, found none; pip install './lab[theory]'"
    ) from error

ASSIGNMENTS = ("hard", "soft")
MERGES = ("existing", "ward", "nearest")

Array = NDArray[np.float64]


@dataclasses.dataclass(eq=False, repr=False)
class GaussianMixtureRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Regression of values on keys by a Gaussian mixture over both, with one spherical covariance I / b.

    `partial_fit` learns as an OVQ layer does, in one pass and constant memory: in each chunk, the most novel
    keys open slots and the others are merged into the nearest slot; or, with `merge="ward"` or `"nearest"`,
    pairs of slots and tokens are merged until they fit. `fit` sees all the data at once and iterates
    expectation-maximisation over (key, value) to convergence, from k-means++ centres; this shows what a
    dictionary of that size can do. `predict` is the conditional mean E[value | key].

    Args:
        num_slots: N, the largest number of components.
        chunk_size: C, the number of tokens that `partial_fit` collects before it merges them.
        precision: b, the inverse variance; the op's `scale`. None: sqrt(K) for keys of K components.
        bias: `"count+norm"`, the log of the mixture's density, or `"count"`, which leaves out -b |D|^2 / 2,
            as the op's default does. Both give the same read for means of equal norm; otherwise `"count"` is
            not a density.
        assignment: `"hard"`: a token belongs to one slot (k-means; OVQ); `"soft"`: to each slot in proportion
            to its posterior. `partial_fit` assigns by the key alone, to slots that existed before the chunk;
            its hard assignment takes the largest dot product, as OVQ does. `fit` assigns by key and value;
            its hard assignment takes the smallest distance.
        growth: the schedule of the dictionary in `partial_fit`, as in the op. None: the op's default.
        merge: what `partial_fit` merges: keys into slots that existed before the chunk (`"existing"`), the
            cheapest pairs of slots and tokens (`"ward"`), or those of the shortest edges (`"nearest"`), as in
            the op. Rules that merge pairs need hard assignment.
        value_weight: w of the rules that merge pairs, as in the op.
        max_iter: the largest number of iterations of `fit`.
        tol: `fit` ends when no mean moves by more than this.
        random_state: seeds the k-means++ start of `fit`.

    Attributes:
        key_sum_: `[n, K]` sums of the keys of each slot, weighted by how much they belong to it.
        value_sum_: `[n, V]` sums of their values.
        count_: `[n]` weights of the slots; they add up to the number of tokens merged.
        pending_keys_: `[p, K]` keys of the incomplete last chunk, each a component of count 1.
        pending_values_: `[p, V]` their values.
        num_seen_: number of tokens seen.
        n_iter_: iterations of the last `fit`; after `partial_fit` alone, the number of chunks merged.

    Raises:
        ValueError: on first use, if an argument has a value not listed above.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> keys = rng.normal(size=(2000, 2)).round(2)
        >>> model = GaussianMixtureRegressor(num_slots=64, chunk_size=32, precision=20.0)
        >>> for part in np.split(keys, 10):
        ...     model = model.partial_fit(part, np.sin(part[:, 0]))
        >>> model.num_seen_, len(model.count_), len(model.pending_keys_), float(model.count_.sum())
        (2000, 62, 16, 1984.0)
        >>> model.score(keys, np.sin(keys[:, 0])) > 0.9  # R^2
        True
    """

    num_slots: int = 64
    _: dataclasses.KW_ONLY
    chunk_size: int = 64
    precision: float | None = None
    bias: str = "count+norm"
    assignment: str = "hard"
    growth: str | None = None
    merge: str = "existing"
    value_weight: float = VALUE_WEIGHT
    max_iter: int = 100
    tol: float = 1e-6
    random_state: Any = None

    @property
    def keys_(self) -> Array:
        """`[n, K]` mean keys D_k of the slots."""
        return self.key_sum_ / self.count_[:, None]

    @property
    def values_(self) -> Array:
        """`[n, V]` mean values D_v of the slots."""
        return self.value_sum_ / self.count_[:, None]

    def fit(self, X: ArrayLike, y: ArrayLike) -> GaussianMixtureRegressor:
        """Run expectation-maximisation over all data: keys `[T, K]` and values `[T, V]` or `[T]`.

        Soft iterations raise the likelihood of the mixture for the given b. Hard iterations are k-means: they
        lower the squared distances to the nearest means. Components that lose all weight are dropped.
        """
        keys, values = self._validated(X, y, is_first=True)
        points = np.hstack([keys, values])
        num = min(self.num_slots, len(points))
        means, _ = kmeans_plusplus(points, num, random_state=self.random_state)
        count = np.full(num, len(points) / num)
        for iteration in range(1, self.max_iter + 1):
            shares = self._shares_of_pairs(points, means, count)
            is_used = shares.sum(0) > 0
            shares, old = shares[:, is_used], means[is_used]
            count = shares.sum(0)
            means = shares.T @ points / count[:, None]
            self.n_iter_ = iteration
            if np.abs(means - old).max() <= self.tol:
                break
        sums = means * count[:, None]
        self.count_, self.key_sum_, self.value_sum_ = count, *np.hsplit(sums, [keys.shape[1]])
        self.pending_keys_, self.pending_values_ = keys[:0], values[:0]
        self.num_seen_ = len(points)
        return self

    def partial_fit(self, X: ArrayLike, y: ArrayLike) -> GaussianMixtureRegressor:
        """Learn the next keys `[T, K]` and values `[T, V]` or `[T]` of a stream, any number at a time."""
        is_first = not hasattr(self, "count_")
        keys, values = self._validated(X, y, is_first=is_first)
        if is_first:
            self.key_sum_, self.value_sum_, self.count_ = keys[:0], values[:0], np.zeros(0)
            self.pending_keys_, self.pending_values_ = keys[:0], values[:0]
            self.num_seen_ = self.n_iter_ = 0
        keys = np.concatenate([self.pending_keys_, keys])
        values = np.concatenate([self.pending_values_, values])
        num_merged = self.num_seen_ - len(self.pending_keys_)
        complete = len(keys) - len(keys) % self.chunk_size
        for start in range(0, complete, self.chunk_size):
            chunk = slice(start, start + self.chunk_size)
            self._merge_chunk(keys[chunk], values[chunk], num_merged + chunk.stop)
        self.pending_keys_, self.pending_values_ = keys[complete:], values[complete:]
        self.num_seen_ = num_merged + len(keys)
        return self

    def predict(self, X: ArrayLike) -> Array:
        """The conditional mean E[value | key] at keys `[T, K]`: `[T, V]`, or `[T]` if values were `[T]`."""
        means = self.posterior(X) @ self._components()[1]
        return means[:, 0] if self._is_single else means

    def posterior(self, X: ArrayLike) -> Array:
        """Posterior `[T, n + p]` of each slot, then of each pending token, given keys `[T, K]`."""
        check_is_fitted(self, "count_")
        queries = validate_data(self, X, reset=False, dtype=np.float64)
        keys, _, count = self._components()
        return _softmax(self._scores(queries, keys, count, has_norm=self.bias == "count+norm"))

    def log_density(self, X: ArrayLike, y: ArrayLike) -> Array:
        """Log density `[T]` of pairs of a key `[T, K]` and a value under the mixture over both."""
        check_is_fitted(self, "count_")
        points = np.hstack(self._validated(X, y, is_first=False))
        keys, values, count = self._components()
        scores = self._scores(points, np.hstack([keys, values]), count / count.sum(), has_norm=True)
        scores -= self._precision / 2 * np.square(points).sum(-1, keepdims=True)
        return np.logaddexp.reduce(scores, axis=1) + points.shape[1] / 2 * np.log(
            self._precision / (2 * np.pi)
        )

    @property
    def _precision(self) -> float:
        return self.n_features_in_**0.5 if self.precision is None else self.precision

    def _components(self) -> tuple[Array, Array, Array]:
        """Mean keys, mean values and counts of the slots, then of the pending tokens."""
        return (
            np.concatenate([self.keys_, self.pending_keys_]),
            np.concatenate([self.values_, self.pending_values_]),
            np.concatenate([self.count_, np.ones(len(self.pending_keys_))]),
        )

    def _validated(self, X: ArrayLike, y: ArrayLike, *, is_first: bool) -> tuple[Array, Array]:
        """Keys `[T, K]` and values `[T, V]` in float64; the first call determines the valid shapes."""
        self._check_arguments()
        keys, targets = validate_data(
            self, X, y, reset=is_first, multi_output=True, y_numeric=True, dtype=np.float64
        )
        values = targets.astype(np.float64).reshape(len(targets), -1)
        if is_first:
            self._is_single, self._value_dim = targets.ndim == 1, values.shape[1]
        if values.shape[1] != self._value_dim:
            raise ValueError(f"y: expected values of {self._value_dim} components, found {values.shape[1]}")
        return keys, values

    def _check_arguments(self) -> None:
        for name in ("num_slots", "chunk_size", "max_iter"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, found {value!r}")
        choices = {
            "bias": BIASES,
            # Rules that merge pairs merge whole items, so there is no soft assignment.
            "assignment": ASSIGNMENTS[:1] if self.merge in PAIR_MERGES else ASSIGNMENTS,
            "growth": (None, *GROWTHS),
            "merge": MERGES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, found {getattr(self, name)!r}")
        check_value_weight("value_weight", self.value_weight)
        if self.precision is not None and not 0 < self.precision < np.inf:
            raise ValueError(
                f"precision: expected a finite positive number or None, found {self.precision!r}"
            )

    def _scores(self, points: Array, means: Array, count: Array, *, has_norm: bool) -> Array:
        """log c + b x.D (- b |D|^2 / 2): the log density of each component up to terms common to all."""
        products = points @ means.T
        if has_norm:
            products -= np.square(means).sum(-1) / 2
        return self._precision * products + np.log(count)

    def _shares_of_pairs(self, points: Array, means: Array, count: Array) -> Array:
        """Responsibilities of the components for points `[T, K + V]`: the E-step of `fit`."""
        if self.assignment == "soft":
            return _softmax(self._scores(points, means, count, has_norm=True))
        return np.eye(len(means))[(points @ means.T - np.square(means).sum(-1) / 2).argmax(1)]

    def _merge_chunk(self, keys: Array, values: Array, num_seen: int) -> None:
        """Learn a complete chunk, after which `num_seen` tokens have been merged."""
        wanted = grown_slots(
            len(self.count_),
            num_seen,
            num_slots=self.num_slots,
            chunk_size=self.chunk_size,
            growth=self.growth or default_growth(self.merge),
        )
        if self.merge in PAIR_MERGES:
            self._merge_pairs(keys, values, num_seen - len(keys), wanted)
        else:
            self._merge_nearest(keys, values, wanted)
        self.n_iter_ += 1

    def _merge_nearest(self, keys: Array, values: Array, wanted: int) -> None:
        """Grow to `wanted` slots by the most novel keys of a chunk; merge the others into the nearest."""
        is_first = not len(self.count_)
        # The first key of a stream opens slot 0, with which the rest of its chunk is compared.
        means, count = (keys[:1], np.ones(1)) if is_first else (self.keys_, self.count_)
        dots = keys @ means.T
        lengths = np.linalg.norm(keys, axis=1)[:, None] * np.linalg.norm(means, axis=1)
        familiarity = (dots / np.maximum(lengths, 1e-30)).max(1)
        if is_first:
            familiarity[0] = -np.inf
        order = familiarity.argsort(kind="stable")
        opening, merging = (np.sort(part) for part in np.split(order, [wanted - len(self.count_)]))
        if self.assignment == "hard":
            shares = np.eye(len(means))[dots[merging].argmax(1)]
        else:
            shares = _softmax(self._scores(keys[merging], means, count, has_norm=self.bias == "count+norm"))
        existing = slice(0, len(means))
        self.key_sum_ = np.concatenate([self.key_sum_, keys[opening]])
        self.value_sum_ = np.concatenate([self.value_sum_, values[opening]])
        self.count_ = np.concatenate([self.count_, np.ones(len(opening))])
        self.key_sum_[existing] += shares.T @ keys[merging]
        self.value_sum_[existing] += shares.T @ values[merging]
        self.count_[existing] += shares.sum(0)

    def _merge_pairs(self, keys: Array, values: Array, num_merged: int, wanted: int) -> None:
        """Merge slots and tokens of a chunk to `wanted` items; `num_merged` tokens were merged before."""
        existing = len(self.count_)
        count = np.concatenate([self.count_, np.ones(len(keys))])
        mean_values = np.concatenate([self.values_, values])
        power = count @ np.square(mean_values).sum(1) / count.sum()
        factor = self.value_weight / power**0.5 if power > 0 else 0.0
        points = np.hstack([np.concatenate([self.keys_, keys]), factor * mean_values])
        if self.merge == "ward":
            lowest = ward_clusters(points, count, wanted)
        else:
            # The tokens, and as many slots, in rotation.
            in_turn = (num_merged + np.arange(min(existing, len(keys)))) % max(existing, 1)
            lowest = nearest_clusters(points, count, [*in_turn, *range(existing, len(points))], wanted)
        # A cluster with slots stays in the lowest of them; one of tokens alone takes a freed or new slot.
        slots = np.unique(lowest)
        is_new = slots >= existing
        places = slots.copy()
        places[is_new] = np.setdiff1d(np.arange(wanted), slots[~is_new])
        shares = np.eye(wanted)[places[np.searchsorted(slots, lowest)]]
        self.key_sum_ = shares.T @ np.concatenate([self.key_sum_, keys])
        self.value_sum_ = shares.T @ np.concatenate([self.value_sum_, values])
        self.count_ = shares.T @ count


def _softmax(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)
