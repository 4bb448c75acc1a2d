"""merge="ward" and "ward-sqrt": which pairs are merged, where they go, the same in every backend."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering
from torch.nn.functional import normalize, scaled_dot_product_attention

from ovq.ops import OVQState
from ovq.ops.options import COUNT_POWERS
from ovq.ops.schedule import GROWTHS
from tests.ops.common import BACKENDS, CPU, assert_same_state, attend, by_turns, inputs
from tests.ops.recount import recount_by_likelihood

WARD = {"merge": "ward"}
LENGTH, CHUNK_SIZE = 72, 12
# Backends and dtypes that they take; the reference knows all dtypes.
FAST = [("torch", x) for x in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
FAST += itertools.product(CPU, (torch.float32, torch.bfloat16))
either_power = pytest.mark.parametrize("merge", COUNT_POWERS)
STREAMS = ("random", "clustered", "repeated", "one-hot", "no values", "long and short", "not finite")


def stream(kind, dtype, *, length=LENGTH, dim=8):
    """Tokens of two heads: q, k `[1, T, 2, K]` and v."""
    q, k, v = inputs(1, length, 2, 2, dim, 6, seed=3)
    which = torch.randint(9, (length,), generator=torch.Generator().manual_seed(1))
    if kind == "clustered":
        k = normalize(k[:, which] + 0.1 * k, dim=-1)
        v = v[:, which] + 0.2 * v
    elif kind == "repeated":  # also in part: equal keys with two values
        k, v = k[:, which], v[:, which % 5]
    elif kind == "one-hot":  # distances of equal pairs are equal, and are not zero
        k = torch.eye(dim, dtype=q.dtype)[which % dim][None, :, None].expand_as(k)
        v = torch.eye(6, dtype=q.dtype)[which % 3][None, :, None].expand_as(v)
    elif kind == "no values":
        v = torch.zeros_like(v)
    elif kind == "long and short":
        large = 1e4 if dtype == torch.float16 else 1e15
        k = k * torch.tensor([1.0, large, 1 / large])[torch.arange(length) % 3, None, None]
        v = v * torch.tensor([1.0, 1.0, large, 1 / large, 0.0])[torch.arange(length) % 5, None, None]
    elif kind == "not finite":
        for x, t, bad in ((k, 5, torch.nan), (v, 14, torch.inf), (k, 30, -torch.inf), (v, 31, torch.nan)):
            x[0, t, 1, 2] = bad
    return [x.to(dtype) for x in (q, k, v)]


@functools.cache
def reference(kind, dtype, **options):
    return attend(*stream(kind, dtype), **options, chunk_size=CHUNK_SIZE, backend="naive")


def check_equal(backend, dtype, kind, **options):
    """The same sums to the last bit: the same tokens, added in the same order."""
    options = WARD | options
    o, state = attend(*stream(kind, dtype), **options, chunk_size=CHUNK_SIZE, backend=backend)
    o_ref, expected = reference(kind, dtype, **options)
    assert torch.equal(state.count, expected.count)
    for name in ("key_sum", "value_sum"):
        torch.testing.assert_close(
            getattr(state, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True
        )
    bound = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    if kind not in ("long and short", "not finite"):
        torch.testing.assert_close(o, o_ref, rtol=bound, atol=bound)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(("backend", "dtype"), FAST, ids=str)
def test_backends_merge_the_same_pairs(backend, dtype, kind):
    check_equal(backend, dtype, kind, num_slots=20)


@pytest.mark.parametrize(("way", "kind", "num_slots"), by_turns(FAST, STREAMS, [20, 48]), ids=str)
def test_backends_merge_the_same_pairs_by_the_square_root_of_counts(way, kind, num_slots):
    backend, dtype = way
    check_equal(backend, dtype, kind, num_slots=num_slots, merge="ward-sqrt")


def test_streams_are_merged_in_groups_where_tables_would_be_large(monkeypatch):
    """Streams of rows of unequal lengths, which have different numbers of merges to make, one at a time."""
    q, k, v = inputs(3, 60, 2, 2)
    mask = torch.arange(60) >= torch.tensor([[0], [13], [31]])
    options = {"merge": "ward-sqrt", "num_slots": 9, "chunk_size": 10, "attention_mask": mask}
    expected = attend(q, k, v, **options, backend="naive")[1]
    assert_same_state(attend(q, k, v, **options, backend="torch")[1], expected, tolerance=0)
    monkeypatch.setattr("ovq.ops.one_by_one._TABLE_BYTES", 1)
    assert_same_state(attend(q, k, v, **options, backend="torch")[1], expected, tolerance=0)


@pytest.mark.parametrize("growth", ["plateau", "linear"])
@pytest.mark.parametrize("value_weight", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["clustered", "one-hot"])
@pytest.mark.parametrize("backend", ["torch", *CPU])
def test_backends_merge_the_same_pairs_with_other_options(backend, kind, value_weight, growth):
    check_equal(backend, torch.float32, kind, num_slots=20, value_weight=value_weight, growth=growth)


@either_power
@pytest.mark.parametrize("kind", ["clustered", "repeated", "random"])
@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("other", [{}, {"growth": "plateau", "value_weight": 0.0}], ids=str)
def test_kernels_merge_as_torch_does_in_larger_dictionaries(backend, kind, merge, other):
    """Many chunks of a full dictionary: what the kernels know of slots is carried from one to the next."""
    tokens = stream(kind, torch.float32, length=1000, dim=16)
    options = {"merge": merge, "num_slots": 150, "chunk_size": 50, **other}
    states = [attend(*tokens, **options, backend=b)[1] for b in ("torch", backend)]
    assert_same_state(states[1], states[0], tolerance=0)


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
        assert state.count[0, head].tolist() == [len(members) for members in slots]
        for sums, tokens in ((state.key_sum, k), (state.value_sum, v)):
            expected = torch.stack([tokens[0, members, head].sum(0) for members in slots])
            torch.testing.assert_close(sums[0, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
def test_slots_count_in_the_length_of_values_by_their_tokens(backend):
    """Many short values in few slots, then few long ones: if slots counted once, s_v would be far larger."""
    generator = torch.Generator().manual_seed(0)
    k = torch.cat(
        [1 + 0.3 * torch.randn(24, 4, generator=generator), torch.randn(16, 4, generator=generator)]
    )
    lengths = torch.cat([torch.full((24, 1), 0.1), torch.full((16, 1), 3.0)])
    v = lengths * torch.randn(40, 3, generator=generator)
    k, v = torch.nn.functional.normalize(k, dim=-1)[None, :, None], v[None, :, None]
    options = {"num_slots": 6, "chunk_size": 8, "value_weight": 0.5}
    _, state = attend(k, k, v, **WARD, **options, backend=backend)
    slots = recount_by_likelihood(k[0, :, 0].double().numpy(), v[0, :, 0].double().numpy(), **options)
    assert state.count[0, 0].tolist() == [len(members) for members in slots]


@pytest.mark.parametrize("value_weight", [0, 0.5, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_chunk_is_the_clustering_of_scikit_learn(backend, value_weight):
    q, k, v = inputs(1, 60, 1, 1)
    keys, values = k[0, :, 0].numpy(), v[0, :, 0].numpy()
    power = np.square(values).sum(1).mean()
    points = np.concatenate([keys, value_weight / power**0.5 * values], 1)
    labels = AgglomerativeClustering(9, linkage="ward").fit_predict(points)
    options = {**WARD, "num_slots": 9, "chunk_size": 60, "value_weight": value_weight}
    _, state = attend(q, k, v, **options, backend=backend)
    # Slots are in the order of their first tokens.
    order = dict.fromkeys(labels.tolist())
    sums = np.stack([keys[labels == label].sum(0) for label in order])
    np.testing.assert_allclose(state.key_sum[0, 0].numpy(), sums, atol=1e-12)


def tokens_of(keys, values=None):
    """q, k, v of one head from rows of numbers; values that say which token each is, for w = 0."""
    k = torch.as_tensor(keys, dtype=torch.float32)[None, :, None]
    v = torch.arange(1.0, k.shape[1] + 1).view(1, -1, 1, 1) if values is None else values
    return k, k, v


@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
def test_equal_pairs_are_merged_from_the_lowest_on(backend):
    """Of orthogonal keys every merge costs 1, whatever the counts: all that is merged goes to slot 0."""
    options = {**WARD, "num_slots": 5, "chunk_size": 8, "value_weight": 0, "backend": backend}
    _, state = attend(*tokens_of(torch.eye(8)), **options)
    assert state.count.flatten().tolist() == [4, 1, 1, 1, 1]
    assert state.value_sum.flatten().tolist() == [1 + 2 + 3 + 4, 5, 6, 7, 8]


@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
def test_slots_are_merged_to_make_room_for_what_is_new(backend):
    """Slots 0 and 2 are near, the tokens are repeats of something else: they get slot 2."""
    old, new = [[1, 0, 0], [0, 1, 0], [1, 0.1, 0]], [[0, 0, 1]] * 3
    options = {**WARD, "num_slots": 3, "chunk_size": 3, "value_weight": 0, "backend": backend}
    _, state = attend(*tokens_of(old + new), **options)
    assert state.count.flatten().tolist() == [2, 1, 3]
    assert state.value_sum.flatten().tolist() == [1 + 3, 2, 4 + 5 + 6]


@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
def test_values_count_by_their_weight(backend):
    """Of three tokens the nearest keys have the most unlike values."""
    keys, values = [[1, 0], [0.9, 0], [0, 1]], torch.tensor([0.0, 3.0, 0.3]).view(1, 3, 1, 1)
    for value_weight, expected in ((0, [2, 1]), (2, [2, 1])):
        options = {**WARD, "num_slots": 2, "chunk_size": 3, "value_weight": value_weight}
        _, state = attend(*tokens_of(keys, values), **options, backend=backend)
        assert state.count.flatten().tolist() == expected
        merged_with_first = 3.0 if value_weight == 0 else 0.3
        torch.testing.assert_close(float(state.value_sum[0, 0, 0]), merged_with_first)


@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
def test_growth_is_immediate_unless_said_otherwise(backend):
    tokens = stream("random", torch.float32)
    options = {**WARD, "num_slots": 40, "chunk_size": CHUNK_SIZE, "backend": backend}
    _, state = attend(*tokens, **options)
    assert_same_state(state, attend(*tokens, **options, growth="immediate")[1], tolerance=0)
    assert int(attend(*tokens, **options, growth="plateau")[1].num_open) < int(state.num_open) == 40


@pytest.mark.parametrize("backend", CPU)
def test_kernels_attend_exactly_while_nothing_is_merged(backend):
    q, k, v = inputs(2, 61, 4, 2, dtype=torch.float32)
    o, _ = attend(q, k, v, **WARD, num_slots=61, chunk_size=8, backend=backend)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    exact = scaled_dot_product_attention(*heads_first, is_causal=True, scale=6**0.5, enable_gqa=True)
    torch.testing.assert_close(o, exact.transpose(1, 2), rtol=1e-5, atol=1e-5)


@either_power
@pytest.mark.parametrize("kind", ["clustered", "repeated", "long and short"])
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [30, 0, 13, 29]], ids=["tokens", "pieces"])
@pytest.mark.parametrize("backend", ["torch", *CPU])
def test_any_split_leaves_the_same_bits(backend, pieces, kind, merge):
    tokens = stream(kind, torch.float32)
    options = {"merge": merge, "num_slots": 20, "chunk_size": CHUNK_SIZE, "backend": backend}
    _, whole = attend(*tokens, **options)
    state = None
    for part in torch.arange(LENGTH).split(pieces):
        _, state = attend(*(x[:, part] for x in tokens), initial_state=state, **options)
    assert_same_state(state, whole, tolerance=0)


PARTS = ("key_sum", "value_sum", "pending_keys", "pending_values")


def gradients_from(state, tokens, backend, options):
    """Of a loss of outputs and final state, with respect to tokens, scale and initial state."""
    scale = torch.linspace(1, 3, tokens[0].shape[2], dtype=state.key_sum.dtype)
    leaves = [x.clone().requires_grad_() for x in (*tokens, scale, *(getattr(state, p) for p in PARTS))]
    before = dataclasses.replace(state, **dict(zip(PARTS, leaves[4:], strict=True)))
    o, after = attend(*leaves[:3], scale=leaves[3], initial_state=before, backend=backend, **options)
    loss = (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)).sum()
    loss = loss + sum(getattr(after, name).sin().sum() for name in PARTS)
    return after, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(
    ("backend", "dtype", "merge"),
    [
        *(("torch", torch.float64, merge) for merge in COUNT_POWERS),
        *((x, torch.float32, merge) for x in CPU for merge in COUNT_POWERS),
    ],
    ids=str,
)
def test_gradients_through_slots_that_were_merged(backend, dtype, merge):
    """Against autograd through the reference, from a full dictionary on, by way of many merges of slots."""
    q, k, v = stream("clustered", dtype)
    q, k, v = torch.cat([q, q.roll(1, 1)], 2), k, v
    # A weight with which slots of this stream are merged: the test says so below.
    options = {"merge": merge, "num_slots": 20, "chunk_size": CHUNK_SIZE, "value_weight": 0.5}
    _, state = attend(q[:, :40], k[:, :40], v[:, :40], **options)
    tokens = [x[:, 40:] for x in (q, k, v)]
    after, grads = gradients_from(state, tokens, backend, options)
    after_ref, grads_ref = gradients_from(state, tokens, "naive", options)
    assert torch.equal(after.key_sum, after_ref.key_sum)
    # Tokens in slots that were there before: some were free, as slots had been merged.
    assert (after.count < state.count).any()
    for name, grad, expected in zip("qkvs" + "kvkv", grads, grads_ref, strict=True):
        assert expected.abs().max() > 1e-3, name
        bound = (1e-9 if dtype == torch.float64 else 1e-5) * max(1, float(expected.abs().max()))
        torch.testing.assert_close(grad, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_through_slots_that_were_merged(backend):
    """Finite differences, along random directions: steps of 1e-6 leave these merges as they are."""
    q, k, v = (x[:, :24] for x in stream("clustered", torch.float64))
    options = {**WARD, "num_slots": 6, "chunk_size": 4, "backend": backend}
    _, state = attend(q[:, :10], k[:, :10], v[:, :10], **options)
    parts = [getattr(state, name) for name in PARTS]

    def call(q, k, v, *parts):
        before = dataclasses.replace(state, **dict(zip(PARTS, parts, strict=True)))
        o, after = attend(q, k, v, initial_state=before, **options)
        return o, after.key_sum, after.value_sum, after.pending_keys

    leaves = [x.clone().requires_grad_() for x in (q[:, 10:], k[:, 10:], v[:, 10:], *parts)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_an_empty_state_and_no_tokens():
    q, k, v = inputs(2, 0)
    empty = OVQState.empty(
        batch_size=2, num_kv_heads=1, key_dim=6, value_dim=5, num_slots=4, chunk_size=4, dtype=q.dtype
    )
    for backend in BACKENDS:
        options = {**WARD, "num_slots": 4, "chunk_size": 4, "backend": backend}
        _, state = attend(q, k, v, initial_state=empty, **options)
        assert_same_state(state, empty, tolerance=0)
