"""The mixture regressor with merge="ward" is what the op learns, and what scikit-learn's clustering finds."""

import numpy as np
import pytest
from sklearn.cluster import AgglomerativeClustering

from ovq_lab.gmr import GaussianMixtureRegressor
from ovq_lab.gmr.ward import ward_clusters
from tests.ops.common import by_turns
from tests.test_gmr import OPTIONS, blobs, check_updates, stream

WARD = {"merge": "ward", **OPTIONS}


def repeating_stream(length):
    """A stream of few keys and values, so that pairs repeat, and distances tie."""
    tensors, _ = stream(length)
    rng = np.random.default_rng(1)
    for x in tensors[1:]:
        # Corners of a cube, which are at equal distances from each other.
        x.copy_(x.new_tensor(rng.integers(2, size=x.shape) - 0.5))
    return tensors, [t[0, :, 0].numpy() for t in tensors]


def squared_error(model, keys, values):
    """L: squared distances of the tokens learned to the means of their slots, from the sums alone."""
    points, sums = np.hstack([keys, values]), np.hstack([model.key_sum_, model.value_sum_])
    return np.square(points).sum() - (np.square(sums).sum(1) / model.count_).sum()


@pytest.mark.parametrize(
    ("merge", "make", "options", "cuts"),
    by_turns(
        ["ward", "nearest"],
        [stream, repeating_stream],
        [{}, {"value_weight": 0.0}, {"value_weight": 3.0}, {"growth": "plateau"}, {"growth": "linear"}],
        # In one call, in four, and token by token.
        [(), (5, 8, 31), tuple(range(1, 70))],
    ),
)
def test_partial_fit_equals_the_update(make, options, cuts, merge):
    check_updates(make(70), cuts, "naive", merge=merge, **OPTIONS, **options)


@pytest.mark.parametrize("value_weight", [0.0, 0.5, 2.0])
def test_a_chunk_that_holds_all_is_clustered_as_scikit_learn_does(value_weight):
    keys, values = blobs(spread=0.3)
    factor = value_weight / np.square(values).sum(1).mean() ** 0.5
    points = np.hstack([keys, factor * values])
    reference = AgglomerativeClustering(20, linkage="ward", compute_distances=True).fit(points)
    model = GaussianMixtureRegressor(20, chunk_size=400, merge="ward", value_weight=value_weight)
    model.partial_fit(keys, values)
    # Slots are numbered in the order of their first tokens.
    _, first, labels = np.unique(reference.labels_, return_index=True, return_inverse=True)
    members = np.eye(20)[first.argsort().argsort()[labels]]
    np.testing.assert_array_equal(model.count_, members.sum(0))
    np.testing.assert_allclose(model.key_sum_, members.T @ keys, atol=1e-12)
    np.testing.assert_allclose(model.value_sum_, members.T @ values, atol=1e-12)
    # What merging cost is what the squared error has grown by; scikit-learn's distances are sqrt(2 cost).
    error = np.square(points - (members.T @ points / members.sum(0)[:, None])[members.argmax(1)]).sum()
    np.testing.assert_allclose(np.square(reference.distances_[:380]).sum() / 2, error)


def test_no_merge_is_cheaper_than_the_one_before():
    """Merging the cheapest pair brings no item nearer to another: the costs are reducible."""
    rng = np.random.default_rng(0)
    points, count = rng.normal(size=(40, 3)), rng.integers(1, 9, size=40).astype(float)
    errors = []
    for num_left in range(40, 0, -1):
        lowest = ward_clusters(points, count, num_left)
        members = np.unique(lowest)[:, None] == lowest
        assert len(members) == num_left
        means = members @ (count[:, None] * points) / (members @ count)[:, None]
        errors.append(count @ np.square(points - means[members.argmax(0)]).sum(1))
    costs = np.diff(errors)
    assert costs[0] > 0
    assert (np.diff(costs) > 0).all()


def test_the_unit_of_the_values_does_not_matter():
    _, (_, keys, values) = stream(70)
    model = GaussianMixtureRegressor(**WARD).partial_fit(keys, values)
    other = GaussianMixtureRegressor(**WARD).partial_fit(keys, 1000 * values)
    np.testing.assert_array_equal(model.count_, other.count_)
    np.testing.assert_allclose(1000 * model.value_sum_, other.value_sum_)


def test_values_that_are_all_zero_do_not_count():
    _, (_, keys, values) = stream(70)
    model = GaussianMixtureRegressor(**WARD).partial_fit(keys, 0 * values)
    other = GaussianMixtureRegressor(value_weight=0.0, **WARD).partial_fit(keys, values)
    np.testing.assert_array_equal(model.key_sum_, other.key_sum_)


def test_one_pass_lies_between_the_rule_of_the_paper_and_what_sees_all():
    """Squared errors and likelihoods: the table of docs/results/memory.md, small."""
    keys, values = blobs(num=1024, spread=0.3)
    values *= 0.5 / np.square(values).sum(1).mean() ** 0.5  # so that distances weigh as they do in fit
    options = {"num_slots": 64, "precision": 30.0, "random_state": 0}
    models = [
        GaussianMixtureRegressor(chunk_size=32, **options).partial_fit(keys, values),
        GaussianMixtureRegressor(chunk_size=32, merge="ward", **options).partial_fit(keys, values),
        GaussianMixtureRegressor(chunk_size=1024, merge="ward", **options).partial_fit(keys, values),
        GaussianMixtureRegressor(**options).fit(keys, values),
    ]
    paper, online, batch, em = (squared_error(model, keys, values) for model in models)
    assert em < batch < online < 0.9 * paper
    paper, online, *_ = (model.log_density(keys, values).mean() for model in models)
    assert online > paper + 0.2
