"""The mixture regressor is what OVQ reads and learns, and what scikit-learn computes where the two meet."""

import importlib
import sys

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans, MiniBatchKMeans, kmeans_plusplus
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_estimator

from ovq.ops import ovq_attention
from ovq.ops.ablation import BIASES
from ovq.ops.schedule import GROWTHS
from ovq_lab.gmr import ASSIGNMENTS, GaussianMixtureRegressor
from tests.ops.common import attend, inputs

SLOTS, CHUNK, SCALE = 12, 8, 3.0
OPTIONS = {"num_slots": SLOTS, "chunk_size": CHUNK}


def stream(length, seed=0):
    """Queries, keys of unit length and values of one head, for the op and for the estimator."""
    tensors = inputs(1, length, 1, 1, seed=seed)
    return tensors, [t[0, :, 0].numpy() for t in tensors]


def blobs(seed=0, num=400, centres=6, spread=0.05):
    """Unit keys around centres far from each other, and the values of a smooth function of them."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(8, centres)))[0].T
    keys = directions[rng.integers(centres, size=num)] + spread * rng.normal(size=(num, 8))
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    weights = rng.normal(size=(8, 3))
    return keys, np.tanh(2 * keys @ weights)


@pytest.mark.parametrize(
    "options", [*({"assignment": name} for name in ASSIGNMENTS), {"merge": "ward"}], ids=str
)
def test_scikit_learn_takes_it_for_an_estimator(options):
    check_estimator(GaussianMixtureRegressor(**options), on_skip=None)


@pytest.mark.parametrize(
    ("bias", "merge"), [*((bias, "existing") for bias in BIASES), ("count+norm", "ward")]
)
def test_predict_equals_the_read(bias, merge):
    """Slots, and the tokens of the chunk up to the query as components of count 1."""
    tensors, (queries, keys, values) = stream(61)
    options = {"merge": merge, **OPTIONS}
    o, _ = ovq_attention(*tensors, scale=SCALE, ablation={"bias": bias}, backend="naive", **options)
    model = GaussianMixtureRegressor(precision=SCALE, bias=bias, **options)
    for t in range(61):
        model.partial_fit(keys[t : t + 1], values[t : t + 1])
        if len(model.pending_keys_):  # the last token of a chunk is read before the chunk is merged
            np.testing.assert_allclose(model.predict(queries[t : t + 1])[0], o[0, t, 0], atol=1e-12)


def test_of_means_of_equal_norm_the_default_read_is_the_conditional_mean():
    tensors, (queries, keys, values) = stream(61)
    is_equal = []
    for growth in ("immediate", "plateau"):  # slots of one unit key each; means of several, which are shorter
        options = {"num_slots": 61, "chunk_size": CHUNK, "growth": growth}
        o, _ = ovq_attention(*tensors, scale=SCALE, **options)
        model = GaussianMixtureRegressor(precision=SCALE, **options).partial_fit(keys, values)
        is_equal.append(np.allclose(model.predict(queries[-1:])[0], o[0, -1, 0], atol=1e-12))
    assert is_equal == [True, False]


def check_updates(tokens, cuts, backend="auto", **options):
    """What the estimator has learned after each part of a stream is what the op has."""
    tensors, (_, keys, values) = tokens
    model = GaussianMixtureRegressor(**options)
    seen, state = 0, None
    for k, v in zip(np.split(keys, cuts), np.split(values, cuts), strict=True):
        model.partial_fit(k, v)
        part = [t[:, seen : seen + len(k)] for t in tensors]
        _, state = attend(*part, initial_state=state, backend=backend, **options)
        seen += len(k)
        np.testing.assert_array_equal(model.count_, state.count[0, 0])
        np.testing.assert_allclose(model.key_sum_, state.key_sum[0, 0], atol=1e-12)
        np.testing.assert_allclose(model.value_sum_, state.value_sum[0, 0], atol=1e-12)
        np.testing.assert_array_equal(model.pending_keys_, state.pending_keys[0, 0, : seen % CHUNK])
    np.testing.assert_allclose(model.values_, state.values[0, 0], atol=1e-12)


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("cuts", [[], [5, 8, 31], list(range(1, 70))], ids=str)
def test_partial_fit_equals_the_update(growth, cuts):
    check_updates(stream(70), cuts, growth=growth, **OPTIONS)


def newton_step(loss, means):
    """The point a Newton step from `means` leads to, and the Hessian, by autograd."""
    gradient = torch.autograd.functional.jacobian(loss, means).flatten()
    hessian = torch.autograd.functional.hessian(loss, means).reshape(len(gradient), -1)
    return means - torch.linalg.solve(hessian, gradient).view_as(means), hessian


def test_the_update_is_a_newton_step_on_the_negative_log_likelihood():
    """Of all (key, value) pairs given their slots, from the means before the chunk."""
    _, (_, keys, values) = stream(80)
    model = GaussianMixtureRegressor(num_slots=4, chunk_size=CHUNK, growth="immediate", precision=SCALE)
    model.partial_fit(keys[:72], values[:72])
    before = torch.tensor(np.hstack([model.keys_, model.values_]))
    nearest = (keys[72:] @ model.keys_.T).argmax(1)
    # Of the tokens merged before, a slot's likelihood is a function of their mean and number alone.
    points = torch.cat([before, torch.tensor(np.hstack([keys, values])[72:])])
    slots = torch.tensor([*range(4), *nearest])
    weights = torch.tensor([*model.count_, *[1.0] * 8])

    def loss(means):
        normal = torch.distributions.Normal(means[slots], SCALE**-0.5)
        return -(weights[:, None] * normal.log_prob(points)).sum()

    model.partial_fit(keys[72:], values[72:])
    after, hessian = newton_step(loss, before)
    assert len(model.count_) == 4
    assert (np.bincount(nearest) > 0).sum() > 1
    np.testing.assert_allclose(np.hstack([model.keys_, model.values_]), after, atol=1e-12)
    expected = SCALE * np.repeat(model.count_, 11)
    np.testing.assert_allclose(hessian, np.diag(expected), atol=1e-10)


def test_one_token_moves_its_slot_by_a_newton_step_of_size_one_by_count():
    point = torch.tensor([0.6, -0.8, 0.0], dtype=torch.float64)
    mean, count = torch.tensor([0.2, 0.1, 0.7], dtype=torch.float64), 5

    def loss(m):  # the token, and the five before it whose gradient vanishes at their mean
        return SCALE / 2 * ((m - point).square().sum() + count * (m - mean).square().sum())

    after, hessian = newton_step(loss, mean)
    torch.testing.assert_close(hessian, SCALE * (count + 1) * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(after, mean + (point - mean) / (count + 1))


def test_a_constant_rate_is_a_newton_step_on_a_likelihood_that_forgets():
    """Each token weighs `rate`, and all before it (1 - rate) of what they did."""
    tensors, (_, keys, _) = stream(8)
    _, state = attend(*tensors, num_slots=1, chunk_size=8, ablation={"rate": 0.3})
    weights = 0.3 * 0.7 ** torch.arange(7, -1, -1, dtype=torch.float64)
    weights[0] = 0.7**7

    def loss(m):
        return SCALE / 2 * (weights * (m - torch.tensor(keys)).square().sum(-1)).sum()

    after, hessian = newton_step(loss, torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(hessian, SCALE * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(state.keys[0, 0, 0], after)


def sklearn_mixture(means, count, precision):
    """scikit-learn's mixture with given parameters."""
    mixture = GaussianMixture(len(means), covariance_type="spherical")
    mixture.means_, mixture.weights_ = means, count / count.sum()
    mixture.covariances_ = np.full(len(means), 1 / precision)
    mixture.precisions_cholesky_ = np.full(len(means), precision**0.5)
    return mixture


def test_posterior_and_density_are_those_of_scikit_learn():
    keys, values = blobs()
    model = GaussianMixtureRegressor(10, precision=7.0, assignment="soft", random_state=0).fit(keys, values)
    of_keys = sklearn_mixture(model.keys_, model.count_, 7.0)
    np.testing.assert_allclose(model.posterior(keys), of_keys.predict_proba(keys), atol=1e-12)
    np.testing.assert_allclose(model.predict(keys), of_keys.predict_proba(keys) @ model.values_, atol=1e-12)
    of_pairs = sklearn_mixture(np.hstack([model.keys_, model.values_]), model.count_, 7.0)
    densities = of_pairs.score_samples(np.hstack([keys, values]))
    np.testing.assert_allclose(model.log_density(keys, values), densities, atol=1e-10)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_soft_iteration_is_that_of_scikit_learn():
    keys, values = blobs()
    points = np.hstack([keys, values])
    start, _ = kmeans_plusplus(points, 10, random_state=0)
    mixture = GaussianMixture(
        10,
        covariance_type="spherical",
        weights_init=np.full(10, 0.1),
        means_init=start,
        precisions_init=np.full(10, 7.0),
        max_iter=1,
    ).fit(points)
    model = GaussianMixtureRegressor(10, precision=7.0, assignment="soft", max_iter=1, random_state=0)
    model.fit(keys, values)
    np.testing.assert_allclose(np.hstack([model.keys_, model.values_]), mixture.means_, atol=1e-9)
    np.testing.assert_allclose(model.count_ / 400, mixture.weights_, atol=1e-9)


def test_soft_iterations_raise_the_likelihood():
    keys, values = blobs(spread=0.3)
    models = [
        GaussianMixtureRegressor(10, precision=7.0, assignment="soft", max_iter=n, tol=0, random_state=0)
        for n in range(1, 12)
    ]
    likelihoods = [model.fit(keys, values).log_density(keys, values).mean() for model in models]
    assert (np.diff(likelihoods) > 0).all()


def test_hard_iterations_are_k_means():
    keys, values = blobs(spread=0.3)
    points = np.hstack([keys, values])
    start, _ = kmeans_plusplus(points, 10, random_state=0)
    reference = KMeans(10, init=start, n_init=1, tol=0, algorithm="lloyd").fit(points)
    model = GaussianMixtureRegressor(10, tol=0, random_state=0).fit(keys, values)
    np.testing.assert_allclose(np.hstack([model.keys_, model.values_]), reference.cluster_centers_, atol=1e-9)
    assert 1 < model.n_iter_ < 100


def test_a_merge_is_the_step_of_mini_batch_k_means():
    """Where clusters are far apart, so that dot product and distance agree on the nearest mean."""
    keys, values = blobs(num=320)
    model = GaussianMixtureRegressor(6, chunk_size=80, random_state=0).fit(keys[:80], values[:80])
    batches = MiniBatchKMeans(6, init=model.keys_, n_init=1, reassignment_ratio=0)
    # Its centres start with no weight: given themselves with their counts, they have ours.
    batches.partial_fit(model.keys_, sample_weight=model.count_)
    for part in (slice(80, 160), slice(160, 240), slice(240, 320)):
        model.partial_fit(keys[part], values[part])
        batches.partial_fit(keys[part])
        np.testing.assert_allclose(model.keys_, batches.cluster_centers_, atol=1e-6)


def test_one_pass_is_as_good_as_mini_batch_k_means_and_worse_than_what_sees_all():
    """Errors of held-out values: the figure of docs/results/memory.md, small."""
    keys, values = blobs(num=2000, spread=0.3)
    train, test = slice(0, 1500), slice(1500, 2000)
    options = {"num_slots": 64, "precision": 30.0, "random_state": 0}
    online = GaussianMixtureRegressor(chunk_size=50, **options).partial_fit(keys[train], values[train])
    offline = GaussianMixtureRegressor(assignment="soft", **options).fit(keys[train], values[train])
    batches = MiniBatchKMeans(64, batch_size=50, n_init=1, random_state=0).fit(keys[train])
    members = np.eye(64)[batches.predict(keys[train])]
    assert (members.sum(0) > 0).all()
    mixture = sklearn_mixture(batches.cluster_centers_, members.sum(0), 30.0)
    means = members.T @ values[train] / members.sum(0)[:, None]
    drawn = GaussianMixtureRegressor(growth="immediate", **options).partial_fit(keys[:64], values[:64])
    found = [model.predict(keys[test]) for model in (online, offline, drawn)]
    found.append(mixture.predict_proba(keys[test]) @ means)
    error, best, worst, reference = (np.square(values[test] - v).sum() for v in found)
    # The worst has a slot for each of the first 64 tokens, and learned nothing from the rest.
    assert best < error < 1.2 * reference
    assert error < 0.9 * worst


def test_the_grid_search_of_scikit_learn_finds_the_precision():
    keys, values = blobs(spread=0.3)
    search = GridSearchCV(
        GaussianMixtureRegressor(40, assignment="soft", random_state=0), {"precision": [0.01, 30.0]}, cv=3
    )
    assert search.fit(keys, values).best_params_ == {"precision": 30.0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"num_slots": 0}, "num_slots: expected an integer of at least 1, found 0"),
        ({"chunk_size": 2.5}, "chunk_size: .* found 2.5"),
        ({"bias": "norm"}, "bias: expected one of .* found 'norm'"),
        ({"assignment": "firm"}, "assignment: expected one of .* found 'firm'"),
        ({"growth": "fast"}, "growth: expected one of .* found 'fast'"),
        ({"precision": -1.0}, "precision: expected a finite positive number or None, found -1.0"),
        ({"precision": np.inf}, "precision: expected a finite positive number or None, found inf"),
        ({"merge": "updated"}, "merge: expected one of .* found 'updated'"),
        ({"value_weight": -1.0}, "value_weight: expected a finite number of at least 0, found -1.0"),
        ({"merge": "ward", "assignment": "soft"}, r"assignment: expected one of \('hard',\), found 'soft'"),
    ],
)
def test_bad_arguments(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        GaussianMixtureRegressor(**arguments).fit(*blobs())


def test_values_of_another_width_are_refused():
    keys, values = blobs()
    model = GaussianMixtureRegressor().partial_fit(keys, values)
    with pytest.raises(ValueError, match="y: expected values of 3 components, found 2"):
        model.partial_fit(keys, values[:, :2])


def test_without_scikit_learn_the_import_says_what_to_install(monkeypatch):
    for name in ("ovq_lab.gmr", "ovq_lab.gmr.regressor"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(ImportError, match=r"ovq_lab.gmr: expected scikit-learn.*'\./lab\[theory\]'"):
        importlib.import_module("ovq_lab.gmr")
