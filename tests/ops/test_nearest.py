"""merge="nearest": which edges are taken, where items go, the same in every backend that knows the rule."""

import dataclasses

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ovq.ops import OVQState, backend_used, nearest
from ovq.ops.options import Options
from ovq.ops.schedule import GROWTHS
from tests.ops.common import CPU, assert_same_state, attend, by_turns, inputs, read_in_pieces
from tests.ops.recount import assert_recounted, recount_by_edges
from tests.ops.streams import LENGTH, PARTS, STREAMS, check_equal, gradients_from, stream, tokens_of

NEAREST = {"merge": "nearest"}
FEW = {"num_slots": 20, "chunk_size": 12}
FAST = ("torch", *CPU)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


# Few slots beside a chunk of 12: a first round of edges is not always enough.
@pytest.mark.parametrize(("dtype", "kind", "num_slots"), by_turns(DTYPES, STREAMS, [3, 9, 20, 48]), ids=str)
def test_backends_merge_what_the_reference_merges(dtype, kind, num_slots):
    for backend in FAST if dtype != torch.float64 else ["torch"]:
        check_equal(backend, dtype, kind, num_slots=num_slots, **NEAREST)


@pytest.mark.parametrize(
    ("kind", "value_weight", "growth"),
    by_turns(["clustered", "one-hot"], [0.0, 2.0], ["plateau", "linear"]),
)
def test_so_it_does_with_other_options(kind, value_weight, growth):
    options = {"num_slots": 20, "value_weight": value_weight, "growth": growth}
    for backend in FAST:
        check_equal(backend, torch.float32, kind, **options, **NEAREST)


@pytest.mark.parametrize(
    ("kind", "growth", "value_weight", "num_slots"),
    by_turns(["random", "clustered", "one-hot", "repeated"], GROWTHS, [0, 0.35, 2], [4, 14]),
)
def test_the_reference_is_what_the_definition_says(kind, growth, value_weight, num_slots):
    _, k, v = stream(kind, torch.float64, length=60)
    options = {"num_slots": num_slots, "chunk_size": 6, "growth": growth, "value_weight": value_weight}
    _, state = attend(k, k, v, **NEAREST, **options, backend="naive")
    for head in range(2):
        slots = recount_by_edges(*(x[0, :, head].numpy() for x in (k, v)), **options)
        assert_recounted(state, head, slots, k, v)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("kind", ["clustered", "repeated", "random"])
def test_kernels_merge_as_torch_does_in_larger_dictionaries(kind, backend):
    """Many chunks of a full dictionary: what the kernels know of slots is carried from one to the next."""
    tokens = stream(kind, torch.float32, length=1000, dim=16)
    options = {**NEAREST, "num_slots": 150, "chunk_size": 50}
    states = [attend(*tokens, **options, backend=b)[1] for b in ("torch", backend)]
    assert_same_state(states[1], states[0], tolerance=0)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("kind", ["still", "moving", "growing"])
def test_slots_that_look_again_find_what_torch_finds(kind, backend):
    """In two dimensions it often matters what a slot found before, also as keys move or values grow."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 400, 2, 2, generator=generator) for _ in range(2))
    if kind == "moving":
        k = (0.3 * k).cumsum(1)
    elif kind == "growing":
        v = v * (torch.arange(400) / 32).exp()[:, None, None]
    options = {**NEAREST, "num_slots": 37, "chunk_size": 8, "value_weight": 1.0}
    states = [attend(k, k, v, **options, backend=b)[1] for b in ("torch", backend)]
    assert_same_state(states[1], states[0], tolerance=0)


@pytest.mark.parametrize("backend", CPU)
def test_numbers_that_are_whole_already_are_multiplied_exactly(backend):
    """Where products are made in bytes, these have no error; the numbers of a vector have one sign."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randint(100, 127, (1, 400, 2, 32), generator=generator).float() for _ in range(2))
    k[..., 0] = v[..., 0] = 127
    options = {**NEAREST, "num_slots": 60, "chunk_size": 50}
    states = [attend(k / 127, k / 127, v / 127, **options, backend=b)[1] for b in ("torch", backend)]
    assert_same_state(*states)


def tight(length, spread):
    """Keys so near to each other that a float32 product tells few of them apart, and values likewise."""
    q, k, v = inputs(1, length, 2, 2, 16, 16, dtype=torch.float32)
    k, v = (x[:, :1] + spread * (x - x[:, :1]) for x in (k, v))
    return q, k, v


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_what_a_float32_product_cannot_tell_apart_is_decided_in_float64(spread, monkeypatch):
    tokens, options = tight(112, spread), {"num_slots": 40, "chunk_size": 16, **NEAREST}
    expected = attend(*tokens, **options, backend="naive")[1]
    for backend in FAST:
        for most_pairs in (0, 1 << 15) if backend == "torch" else (0,):
            monkeypatch.setattr(nearest, "_PAIRS", most_pairs)
            assert_same_state(attend(*tokens, **options, backend=backend)[1], expected, tolerance=0)


def test_most_edges_are_decided_without_float64(monkeypatch):
    """Negative control of the test above: of keys in all directions few are computed again."""
    tokens = inputs(1, 640, 2, 2, 32, 32, dtype=torch.float32)
    num, distances = [], nearest._Clusters._distances

    def counted(clusters, s, a, b):
        num.append(a.numel())
        return distances(clusters, s, a, b)

    monkeypatch.setattr(nearest._Clusters, "_distances", counted)
    attend(*tokens, num_slots=256, chunk_size=64, backend="torch", **NEAREST)
    assert 0 < sum(num) < 6 * 2 * 128 / 4


def by_all(tokens, **options):
    """The state after tokens, the same by all backends."""
    states = [attend(*tokens, **NEAREST, backend=name, **options)[1] for name in ("naive", *FAST)]
    for state in states[1:]:
        assert_same_state(state, states[0], tolerance=0)
    return states[0]


def of_one_head(keys, **options):
    """Counts and sums of values after tokens of a value each, 1, 2, 3, ... by all backends, which agree."""
    state = by_all(tokens_of(keys), value_weight=0, **options)
    return state.count.flatten().tolist(), state.value_sum.flatten().tolist()


@pytest.mark.parametrize("most", [127, 63])
def test_rounding_to_bytes_may_add_up(most):
    """In bytes the numbers of a vector are whole, up to `most`. Here all are lowered by half of one, and the
    product with the nearest item is off by as much as it can be, to the side of its opposite."""
    pattern = [[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(7)]
    far = [[50 * x for x in row] for row in pattern[1:]]
    near, opposite = [20.0] * 64, [-20.0] * 64
    token = [most, -most, *[-0.51] * 30, *[0.49] * 32]
    # Slots of the first chunk search in the third one, in which those of `far` come again.
    keys = [*far[:4], near, opposite, *far[4:], token, far[0], far[1], far[0]]
    counts, _ = of_one_head(keys, num_slots=8, chunk_size=4)
    assert counts == [3, 2, 1, 1, 2, 1, 1, 1]


def test_the_shortest_edges_are_taken_and_chains_end_in_one_slot():
    """Each of 0, 1, 2.1 is nearest to the one before; 10 and 20 stay alone."""
    found = of_one_head([[0.0], [1.0], [2.1], [10.0], [20.0]], num_slots=3, chunk_size=5)
    assert found == ([3, 1, 1], [1 + 2 + 3, 4, 5])


def test_of_edges_of_one_length_those_of_the_lowest_items_are_taken():
    """0 and 1 are each other's nearest, as are 10 and 11: the edges that count are those of 1 and 11."""
    found = of_one_head([[10.0], [0.0], [1.0], [11.0]], num_slots=3, chunk_size=4)
    assert found == ([1, 2, 1], [1, 2 + 3, 4])


def test_of_equally_near_items_the_first_is_the_nearest():
    """0 is as near to 1 as to -1, each of which has a nearer one; three edges are the first half."""
    keys = [1.0, -1.0, 0.0, 1.5, -1.5, 100.0, 101.2, 200.0, 201.2, 300.0, 301.2]
    found = of_one_head([[key] for key in keys], num_slots=5, chunk_size=11)
    assert found == ([3, 2, 2, 2, 2], [1 + 3 + 4, 2 + 5, 6 + 7, 8 + 9, 10 + 11])


def test_what_has_joined_looks_again_and_others_keep_to_what_their_targets_are_in():
    """Two of three merges join 0 to 1 and 4 to 5. 2.4 keeps to the cluster of 1, at 0.5; 4.5 is farther."""
    keys = [0.0, 1.0, 2.4, 4.0, 5.0, 50.0]
    found = of_one_head([[key] for key in keys], num_slots=3, chunk_size=6)
    assert found == ([3, 2, 1], [1 + 2 + 3, 4 + 5, 6])


def test_where_edges_are_too_few_clusters_look_for_each_other():
    """Two pairs, so two edges; three are due. Means 0.5 and 10.5 then are nearest to each other."""
    assert of_one_head([[0.0], [1.0], [10.0], [11.0]], num_slots=1, chunk_size=4) == ([4], [10])
    # Clusters at 0.5, 5.5 and 10: 5.5 goes to the last, where single items at 5 would have gone to the first.
    keys = [[0.0], [1.0], [5.0], [6.0], [9.9], [10.1]]
    assert of_one_head(keys, num_slots=2, chunk_size=6) == ([2, 4], [1 + 2, 3 + 4 + 5 + 6])


def test_slots_are_looked_at_in_turn():
    """Slots 2 and 3 hold nearly the same key. After four tokens it is the turn of slots 0 and 1."""
    keys, options = [[0.0], [100.0], [300.0], [301.0], [1000.0], [1001.0]], {"num_slots": 4, "chunk_size": 2}
    assert of_one_head(keys, **options) == ([2, 2, 1, 1], [1 + 2, 5 + 6, 3, 4])
    # After six it is theirs.
    found = of_one_head([*keys, [2000.0], [2001.0]], **options)
    assert found == ([2, 2, 2, 2], [1 + 2, 5 + 6, 3 + 4, 7 + 8])


FAR = [100.0, 100.0]
TWICE = {
    # The slot at 0 finds that at 1 in the third chunk and again in the fifth, a token at -3 is further away.
    "what has not changed": [[0.0, 0.0], FAR, [1.0, 0.0], [0.0, 90.0], *[FAR] * 4, [-3.0, 0.0], FAR],
    # The slot at (5, 2) comes nearer as a token joins it, after that at 0 has found the one at -5.2.
    "what has come nearer": [
        *([0.0, 0.0], FAR, [-5.2, 0.0], [5.0, 2.0], [5.0, -2.0], *[FAR] * 4, [300.0, 300.0]),
    ],
    # The slot at 0 finds that at 1, then a token at -0.95, which joins the slot at -1.2, then that at 1.
    "what it left for another": [
        *([0.0, 0.0], FAR, [1.0, 0.0], [0.0, -1.2], *[FAR] * 4),
        *([0.0, -0.95], *[FAR] * 4, [300.0, 300.0]),
    ],
}


@pytest.mark.parametrize("keys", TWICE.values(), ids=TWICE)
def test_a_slot_that_looks_again_finds(keys):
    of_one_head(keys, num_slots=4, chunk_size=2)


def weighted(keys, weights, **options):
    """The state after tokens of one head and of these weights, by all backends."""
    options |= {"token_weights": torch.tensor(weights)[None, :, None], "value_weight": 0}
    return by_all(tokens_of(keys), **options)


def test_what_weighs_nothing_is_freed_first_and_attracts_nothing():
    """After six tokens it is the turn of slots 0 and 1. Slot 3 is empty, and nearest to the last token."""
    keys = [[100.0], [200.0], [300.0], [1.0], [400.0], [500.0], [0.9], [1.1]]
    state = weighted(keys, [1.0, 1, 1, 0, 1, 1, 0, 1], num_slots=6, chunk_size=2)
    assert state.value_sum.flatten().tolist() == [1, 2, 3, 8, 5, 6]
    assert state.count.flatten().tolist() == [3, 1, 1, 1, 1, 1]
    # It goes to the first that weighs something, here slot 2, which takes the place of slot 0.
    state = weighted(keys, [0.0, 0, 1, 1, 1, 1, 1, 1], num_slots=6, chunk_size=2)
    assert state.value_sum.flatten().tolist() == [3, 7, 8, 4, 5, 6]
    assert state.count.flatten().tolist() == [3, 1, 1, 1, 1, 1]


def test_nothing_that_weighs_anything_need_be_joined():
    """All that looks for another weighs nothing, and two parts are taken."""
    state = weighted([[1.0], [2.0], [3.0], [4.0]], [0.0] * 4, num_slots=2, chunk_size=2)
    assert state.count.sum() == 4


def test_what_weighs_less_costs_less():
    """30 and 31 are nearer to each other than 0 and 1.05 (squared 1.1); (m n / (m + n))^(1/3) decides."""
    keys, options = [[0.0], [1.05], [30.0], [31.0]], {"num_slots": 3, "chunk_size": 4}
    assert weighted(keys, [1.0, 1, 1, 1], **options).count.flatten().tolist() == [1, 1, 2]
    assert weighted(keys, [1.0, 0.5, 1, 1], **options).count.flatten().tolist() == [2, 1, 1]
    assert weighted(keys, [1.0, 1, 1, 9], **options).count.flatten().tolist() == [2, 1, 1]


def test_cycles_are_broken_at_their_lowest_items():
    """Equal distances leave cycles of two; what is equal within rounding alone might leave others."""
    target = torch.tensor([[1, 2, 0, 4, 3, 3, 6, 5], [7, 0, 1, 2, 3, 4, 5, 6]])
    found = nearest._is_lowest_of_cycle(target).nonzero().tolist()
    assert found == [[0, 0], [0, 3], [0, 6], [1, 0]]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("kind", ["clustered", "repeated", "long and short"])
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [30, 0, 13, 17]], ids=["tokens", "pieces"])
def test_any_split_leaves_the_same_bits(pieces, kind, backend):
    tokens = stream(kind, torch.float32)
    options = {**NEAREST, "num_slots": 20, "chunk_size": 12, "backend": backend}
    _, whole = attend(*tokens, **options)
    _, state = read_in_pieces(dict(zip("qkv", tokens, strict=True)), pieces, **options)
    assert_same_state(state, whole, tolerance=0)


def test_the_kernels_are_chosen_where_there_are_any():
    attend(*stream("random", torch.float32), **NEAREST, num_slots=20, chunk_size=12)
    assert backend_used() == FAST[-1]


@pytest.mark.parametrize("backend", FAST)
def test_rows_whose_slots_have_other_turns_do_not_disturb_each_other(backend):
    """Rows that have seen 53, 40 and 22 tokens and go on together."""
    q, k, v = inputs(3, 60, 2, 2, dtype=torch.float32)
    mask = torch.arange(60) >= torch.tensor([[7], [20], [38]])
    options = {**NEAREST, "num_slots": 25, "chunk_size": 6, "backend": backend}
    _, state = attend(q, k, v, **options, attention_mask=mask)
    for row, first in enumerate([7, 20, 38]):
        _, alone = attend(*(x[row : row + 1, first:] for x in (q, k, v)), **options)
        assert_same_state(state.select([row]), alone, tolerance=0)


@pytest.mark.parametrize("num_slots", [14, 20])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), *((x, torch.float32) for x in CPU)], ids=str
)
def test_gradients_through_slots_that_were_merged(backend, dtype, num_slots):
    """Against autograd through the reference, from a full dictionary on, by way of many merges of slots."""
    q, k, v = stream("clustered", dtype)
    q = torch.cat([q, q.roll(1, 1)], 2)
    options = {**NEAREST, "num_slots": num_slots, "chunk_size": 12}
    _, state = attend(q[:, :40], k[:, :40], v[:, :40], **options)
    tokens = [x[:, 40:] for x in (q, k, v)]
    after, grads = gradients_from(state, tokens, backend, options)
    after_ref, grads_ref = gradients_from(state, tokens, "naive", options)
    assert torch.equal(after.key_sum, after_ref.key_sum)
    assert (after.count < state.count).any()
    for name, grad, expected in zip("qkvs" + "kvkv", grads, grads_ref, strict=True):
        assert expected.abs().max() > 1e-3, name
        bound = (1e-9 if dtype == torch.float64 else 2e-5) * max(1, float(expected.abs().max()))
        torch.testing.assert_close(grad, expected, rtol=0, atol=bound)


def test_squares_of_lengths_may_be_too_large_for_float32():
    q, k, v = inputs(1, 60, 2, 2, dtype=torch.float32)
    k[:, ::3] *= 1e20
    by_all((q, k, v), num_slots=7, chunk_size=4)


def test_weights_in_float64_are_summed_as_they_are():
    """The reference works on masses of clusters in place, and not on those of slots."""
    tokens, weights = inputs(1, 60, 2, 2), torch.linspace(0.5, 2, 60, dtype=torch.float64)[None, :, None]
    options = {"num_slots": 7, "chunk_size": 4, "token_weights": weights.expand(1, 60, 2), **NEAREST}
    states = [attend(*tokens, **options, backend=name)[1] for name in ("naive", "torch")]
    assert_same_state(*states)
    torch.testing.assert_close(states[0].weight, states[1].weight)
    torch.testing.assert_close(states[0].weight.sum(-1), weights.sum().expand(1, 2))


@pytest.mark.parametrize("backend", FAST)
def test_masses_may_count_by_another_power(backend, monkeypatch):
    def other(**settings):
        return Options(**settings | {"growth": "immediate"}, mass_power=1.0)

    usual = attend(*stream("clustered", torch.float32), **NEAREST, **FEW, backend=backend)[1]
    monkeypatch.setattr("ovq.ops.attention.options_of", other)
    state, expected = (
        attend(*stream("clustered", torch.float32), **NEAREST, **FEW, backend=b)[1]
        for b in (backend, "naive")
    )
    assert_same_state(state, expected)
    assert not torch.equal(state.count, usual.count)


@pytest.mark.parametrize(
    ("merge", "backend"), [("ward", "naive"), *(("nearest", backend) for backend in ("naive", *FAST))]
)
def test_growth_is_immediate_unless_said_otherwise(merge, backend):
    tokens = stream("random", torch.float32)
    options = {"merge": merge, "num_slots": 40, "chunk_size": 12, "backend": backend}
    _, state = attend(*tokens, **options)
    assert_same_state(state, attend(*tokens, **options, growth="immediate")[1], tolerance=0)
    assert int(attend(*tokens, **options, growth="plateau")[1].num_open) < int(state.num_open) == 40


@pytest.mark.parametrize("backend", CPU)
def test_kernels_attend_exactly_while_nothing_is_merged(backend):
    q, k, v = inputs(2, 61, 4, 2, dtype=torch.float32)
    o, _ = attend(q, k, v, **NEAREST, num_slots=61, chunk_size=8, backend=backend)
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    exact = scaled_dot_product_attention(*heads_first, is_causal=True, scale=6**0.5, enable_gqa=True)
    torch.testing.assert_close(o, exact.transpose(1, 2), rtol=1e-5, atol=1e-5)


# The rules that merge pairs, each with those backends that have it.
PAIRED = [("naive", "ward"), ("naive", "nearest"), ("torch", "nearest")]


@pytest.mark.parametrize(("backend", "merge"), PAIRED)
def test_gradcheck_through_slots_that_were_merged(backend, merge):
    """Finite differences, along random directions: steps of 1e-6 leave these merges as they are."""
    q, k, v = (x[:, :24] for x in stream("clustered", torch.float64))
    options = {"merge": merge, "num_slots": 6, "chunk_size": 4, "backend": backend}
    _, state = attend(q[:, :10], k[:, :10], v[:, :10], **options)
    parts = [getattr(state, name) for name in PARTS]

    def call(q, k, v, *parts):
        before = dataclasses.replace(state, **dict(zip(PARTS, parts, strict=True)))
        o, after = attend(q, k, v, initial_state=before, **options)
        return o, after.key_sum, after.value_sum, after.pending_keys

    leaves = [x.clone().requires_grad_() for x in (q[:, 10:], k[:, 10:], v[:, 10:], *parts)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(("backend", "merge"), PAIRED)
def test_an_empty_state_and_no_tokens(backend, merge):
    q, k, v = inputs(2, 0)
    empty = OVQState.empty(
        batch_size=2, num_kv_heads=1, key_dim=6, value_dim=5, num_slots=4, chunk_size=4, dtype=q.dtype
    )
    options = {"merge": merge, "num_slots": 4, "chunk_size": 4, "backend": backend}
    _, state = attend(q, k, v, initial_state=empty, **options)
    assert_same_state(state, empty, tolerance=0)
