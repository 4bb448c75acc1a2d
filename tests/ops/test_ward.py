"""merge="ward" and "ward-sqrt", exact greedy merging: which pairs are merged, by the reference alone."""

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering

from ovq.ops import backend_used, slot_assignments
from ovq.ops.options import COUNT_POWERS, Options
from ovq.ops.schedule import GROWTHS
from tests.ops.common import CPU, assert_same_state, attend, by_turns, inputs
from tests.ops.recount import assert_recounted, recount_by_likelihood
from tests.ops.streams import stream, tokens_of

WARD = {"merge": "ward", "backend": "naive"}
either_power = pytest.mark.parametrize("merge", COUNT_POWERS)


@either_power
@pytest.mark.parametrize("name", ["torch", *CPU])
def test_fast_backends_refuse_them_by_name(name, merge):
    q, k, v = inputs(1, 8, dtype=torch.float32)
    expected = (
        rf"^backend: '{name}': expected merge to be one of \('existing', .*'nearest'\), found '{merge}'"
    )
    with pytest.raises(ValueError, match=expected):
        attend(q, k, v, num_slots=4, chunk_size=4, merge=merge, backend=name)
    with pytest.raises(ValueError, match=expected):
        slot_assignments(k, v, num_slots=4, chunk_size=4, merge=merge, backend=name)


@either_power
def test_kernels_for_gpus_refuse_them_by_name(merge):
    """Here, because it takes neither Triton nor a GPU."""
    from ovq.ops.backends import refusal

    x = torch.zeros(1, 4, 1, 8)
    options = Options(num_slots=8, chunk_size=4, growth="plateau", init="novelty", merge=merge, seed=0)
    expected = f"expected merge to be one of ('existing', 'nearest'), found '{merge}'"
    assert refusal("triton", x, x, options) == expected


@either_power
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_auto_runs_the_reference(dtype, merge):
    tokens = inputs(2, 30, dtype=dtype)
    options = {"num_slots": 6, "chunk_size": 4, "merge": merge}
    o, state = attend(*tokens, **options)
    assert backend_used() == "naive"
    expected, final = attend(*tokens, **options, backend="naive")
    assert torch.equal(o, expected)
    assert_same_state(state, final, tolerance=0)


@pytest.mark.parametrize(
    ("rule", "kind", "growth", "value_weight"),
    by_turns(COUNT_POWERS.items(), ["clustered", "one-hot"], GROWTHS, [0, 0.5, 2]),
)
def test_the_reference_is_what_the_definition_says(rule, kind, growth, value_weight):
    """Every cluster in its slot, recounted from the sum of squared distances itself."""
    merge, power = rule
    _, k, v = stream(kind, torch.float64, length=50)
    options = {"num_slots": 12, "chunk_size": 10, "growth": growth, "value_weight": value_weight}
    _, state = attend(k, k, v, merge=merge, **options, backend="naive")
    for head in range(2):
        keys, values = (x[0, :, head].numpy() for x in (k, v))
        slots = recount_by_likelihood(keys, values, **options, count_power=power)
        assert_recounted(state, head, slots, k, v)


def test_slots_count_in_the_length_of_values_by_their_tokens():
    """Many short values in few slots, then few long ones: if slots counted once, s_v would be far larger."""
    generator = torch.Generator().manual_seed(0)
    k = torch.cat(
        [1 + 0.3 * torch.randn(24, 4, generator=generator), torch.randn(16, 4, generator=generator)]
    )
    lengths = torch.cat([torch.full((24, 1), 0.1), torch.full((16, 1), 3.0)])
    v = lengths * torch.randn(40, 3, generator=generator)
    k, v = torch.nn.functional.normalize(k, dim=-1)[None, :, None], v[None, :, None]
    options = {"num_slots": 6, "chunk_size": 8, "value_weight": 0.5}
    _, state = attend(k, k, v, **WARD, **options)
    slots = recount_by_likelihood(k[0, :, 0].double().numpy(), v[0, :, 0].double().numpy(), **options)
    assert state.count[0, 0].tolist() == [len(members) for members in slots]


@pytest.mark.parametrize("value_weight", [0, 0.5, 2])
def test_one_chunk_is_the_clustering_of_scikit_learn(value_weight):
    q, k, v = inputs(1, 60, 1, 1)
    keys, values = k[0, :, 0].numpy(), v[0, :, 0].numpy()
    power = np.square(values).sum(1).mean()
    points = np.concatenate([keys, value_weight / power**0.5 * values], 1)
    labels = AgglomerativeClustering(9, linkage="ward").fit_predict(points)
    options = {**WARD, "num_slots": 9, "chunk_size": 60, "value_weight": value_weight}
    _, state = attend(q, k, v, **options)
    # Slots are in the order of their first tokens.
    order = dict.fromkeys(labels.tolist())
    sums = np.stack([keys[labels == label].sum(0) for label in order])
    np.testing.assert_allclose(state.key_sum[0, 0].numpy(), sums, atol=1e-12)


@either_power
def test_equal_pairs_are_merged_from_the_lowest_on(merge):
    """Of orthogonal keys every merge costs 1, whatever the counts: all that is merged goes to slot 0.

    By "ward-sqrt" what has been merged costs less.
    """
    options = {"num_slots": 5, "chunk_size": 8, "value_weight": 0, "backend": "naive", "merge": merge}
    _, state = attend(*tokens_of(torch.eye(8)), **options)
    assert state.count.flatten().tolist() == [4, 1, 1, 1, 1]
    assert state.value_sum.flatten().tolist() == [1 + 2 + 3 + 4, 5, 6, 7, 8]


def test_slots_are_merged_to_make_room_for_what_is_new():
    """Slots 0 and 2 are near, the tokens are repeats of something else: they get slot 2."""
    old, new = [[1, 0, 0], [0, 1, 0], [1, 0.1, 0]], [[0, 0, 1]] * 3
    options = {**WARD, "num_slots": 3, "chunk_size": 3, "value_weight": 0}
    _, state = attend(*tokens_of(old + new), **options)
    assert state.count.flatten().tolist() == [2, 1, 3]
    assert state.value_sum.flatten().tolist() == [1 + 3, 2, 4 + 5 + 6]


def test_values_count_by_their_weight():
    """Of three tokens the nearest keys have the most unlike values."""
    keys, values = [[1, 0], [0.9, 0], [0, 1]], torch.tensor([0.0, 3.0, 0.3]).view(1, 3, 1, 1)
    for value_weight, expected in ((0, [2, 1]), (2, [2, 1])):
        options = {**WARD, "num_slots": 2, "chunk_size": 3, "value_weight": value_weight}
        _, state = attend(*tokens_of(keys, values), **options)
        assert state.count.flatten().tolist() == expected
        merged_with_first = 3.0 if value_weight == 0 else 0.3
        torch.testing.assert_close(float(state.value_sum[0, 0, 0]), merged_with_first)


def test_what_was_merged_may_come_nearer_than_its_parts():
    """Of five tokens two pairs are the cheapest, but one takes in a third token before the other's turn."""
    k = torch.zeros(5, 6)
    k[:3, :3] = torch.eye(3) / 2**0.5
    k[3:, 3] = 9
    k[4, 4] = 1.01
    squared = (k[:, None] - k).square().sum(-1)
    assert squared[3, 4] < 1.03 * squared[0, 1] < squared[2, 3]
    tokens = k[None, :, None], k[None, :, None], torch.ones(1, 5, 1, 1)
    options = {"merge": "ward-sqrt", "num_slots": 3, "chunk_size": 5, "value_weight": 0}
    _, state = attend(*tokens, **options, backend="naive")
    assert state.count.flatten().tolist() == [3, 1, 1]
