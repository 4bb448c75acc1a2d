"""Weights with which tokens are merged, in `naive` and `torch`; `test_token_weights.py` is about kernels."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ovq.ops import OVQState, ovq_attention, slot_assignments
from ovq.ops.options import CURRENT_MERGES
from ovq.ops.state import with_capacity
from tests.ops.common import assert_same_state, attend, inputs, read_in_pieces, with_gradients

CHUNK = 4
OPTIONS = {
    "some zero": {"weights": "some zero"},
    "positive, with norms": {"weights": "positive", "ablation": {"bias": "count+norm"}},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
each_merge = pytest.mark.parametrize("merge", CURRENT_MERGES)


def token_weights(kind, batch, length, heads=1, *, seed=0):
    """Weights `[B, T, Hkv]` of a kind."""
    draw = torch.rand(
        batch, length, heads, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    kinds = {
        "positive": 0.1 + 2 * draw,
        "some zero": (2 * draw - 0.8).clamp(min=0),
        "tiny": draw**12,
        "all zero": 0 * draw,
        "one": torch.ones_like(draw),
    }
    return kinds[kind]


def arguments(batch, length, heads=2, kv_heads=1, *, seed=0, num_slots=8, weights=None, **options):
    """Tensors of a call by name, and its other arguments."""
    q, k, v = inputs(batch, length, heads, kv_heads, 5, 3, seed=seed)
    tensors = {"q": q, "k": k, "v": v}
    if weights is not None:
        tensors["token_weights"] = token_weights(weights, batch, length, kv_heads, seed=seed)
    scale = torch.linspace(1, 3, heads, dtype=q.dtype)
    return tensors, {"num_slots": num_slots, "chunk_size": CHUNK, "scale": scale, **options}


def run(tensors, options, pieces=None, **more):
    """Outputs and state of a call, or of one for each piece."""
    return read_in_pieces(tensors, pieces or [tensors["q"].shape[1]], **options, **more)


def assert_equal_calls(found, expected):
    """Outputs, states and gradients of two calls."""
    torch.testing.assert_close(found[0], expected[0], rtol=1e-8, atol=1e-8)
    assert_same_state(found[1], expected[1], tolerance=1e-8)
    for grad, reference in zip(found[2], expected[2], strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-7, atol=1e-7)


@each_option
@each_merge
def test_torch_equals_naive(options, merge):
    tensors, options = arguments(2, 23, 4, 2, merge=merge, **options)
    expected = with_gradients(tensors, options | {"backend": "naive"})
    found = with_gradients(tensors, options | {"backend": "torch"}, [9, 14])
    assert_equal_calls(found, expected)


@st.composite
def calls(draw):
    """Arguments of `arguments`, and pieces of the call."""
    options = {
        "batch": draw(st.sampled_from([1, 2])),
        "length": draw(st.sampled_from([1, 7, 16, 21])),
        "num_slots": draw(st.sampled_from([2, 5, 9, 40])),
        "weights": draw(st.sampled_from([None, "positive", "some zero", "tiny", "all zero"])),
        "merge": draw(st.sampled_from(CURRENT_MERGES)),
        "growth": draw(st.sampled_from(["plateau", "linear", "immediate"])),
        "seed": draw(st.integers(0, 99)),
    }
    if options["merge"] in CURRENT_MERGES[:2] and draw(st.booleans()):
        options |= {"init": "random", "generator": torch.Generator().manual_seed(3)}
    cut = draw(st.integers(0, options["length"]))
    return options, [cut, options["length"] - cut]


@settings(max_examples=8, deadline=None)
@given(calls())
def test_backends_agree_however_a_stream_is_split(call):
    options, pieces = call
    tensors, options = arguments(options.pop("batch"), options.pop("length"), **options)
    expected = with_gradients(tensors, options | {"backend": "naive"})
    assert_equal_calls(with_gradients(tensors, options | {"backend": "torch"}, pieces), expected)


@each_option
def test_token_by_token(options):
    """Without gradients, a token per row is decoded from the state in place."""
    tensors, options = arguments(2, 23, 4, 2, merge="nearest", **options)
    expected, final = run(tensors, options, backend="naive")
    with torch.no_grad():
        o, state = run(tensors, options, [1] * 23)
    torch.testing.assert_close(o, expected, rtol=1e-8, atol=1e-8)
    assert_same_state(state, final)


@pytest.mark.parametrize(
    ("merge", "bias"), [("existing", "count"), ("nearest", "count"), ("nearest", "count+norm")]
)
def test_gradcheck(merge, bias):
    """Finite differences; weights stay away from 0, where a slot of one token comes into being."""
    rule = {"merge": merge, "ablation": {"bias": bias}}
    tensors, options = arguments(1, 13, 1, 1, seed=5, num_slots=4, **rule, weights="positive")
    leaves = [x.clone().requires_grad_() for x in (*tensors.values(), options["scale"])]

    def call(*values):
        given = dict(zip([*tensors, "scale"], values, strict=True))
        o, state = attend(**options | given)
        return o, state.key_sum, state.value_sum, state.weight

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@each_merge
def test_a_query_reads_slots_by_their_weights_and_the_chunk_without(merge):
    """Equal to a softmax written out."""
    tensors, options = arguments(1, 26, 1, 1, num_slots=6, weights="positive", merge=merge)
    o, _ = run(tensors, options)
    for t in (3, 4, 12, 15, 25):
        start = t // CHUNK * CHUNK
        _, state = attend(**{name: x[:, :start] for name, x in tensors.items()}, **options)
        q, k, v = (tensors[name][0, :, 0] for name in ("q", "k", "v"))
        of_slots = options["scale"] * (state.keys[0, 0] @ q[t]) + state.weight[0, 0].log()
        scores = torch.cat([of_slots, options["scale"] * (k[start : t + 1] @ q[t])])
        values = torch.cat([state.values[0, 0], v[start : t + 1]])
        torch.testing.assert_close(o[0, t, 0], scores.softmax(0) @ values, rtol=1e-9, atol=1e-9)


def check_rows(rows, options, bound, tolerance):
    """Rows are equal alone, packed and padded: outputs within `bound`, states within `tolerance`."""
    lengths = [row["q"].shape[1] for row in rows]
    width = max(lengths) + 2
    alone = [attend(**row, **options) for row in rows]
    packed = {name: torch.cat([row[name] for row in rows], 1) for name in rows[0]}
    bounds = [0, *itertools.accumulate(lengths)]
    o, state = attend(**packed, **options, cu_seqlens=torch.tensor(bounds))
    mask = torch.zeros(len(rows), width)
    padded = {name: x.new_full((len(rows), width, *x.shape[2:]), torch.nan) for name, x in packed.items()}
    for r, n in enumerate(lengths):
        mask[r, width - n :] = 1
        for name, x in padded.items():
            x[r, width - n :] = rows[r][name][0]
    o_padded, padded_state = attend(**padded, **options, attention_mask=mask)
    for r, (expected, final) in enumerate(alone):
        torch.testing.assert_close(o[:, bounds[r] : bounds[r + 1]], expected, rtol=bound, atol=bound)
        torch.testing.assert_close(o_padded[r, width - lengths[r] :], expected[0], rtol=bound, atol=bound)
        for each in (state, padded_state):
            one = each.select([r])
            assert_same_state(one, final, tolerance=tolerance)
            weight = one.weight[..., : final.weight.shape[2]]
            torch.testing.assert_close(weight, final.weight, rtol=tolerance, atol=tolerance)


@each_option
def test_rows_alone_padded_and_packed(options):
    rows = [arguments(1, n, seed=n, **{"merge": "nearest", **options}) for n in (22, 5, 13)]
    check_rows([tensors for tensors, _ in rows], rows[0][1], 1e-9, 1e-9)


@each_option
@pytest.mark.parametrize("bad", [2.0, torch.nan])
def test_causality_bit_for_bit(options, bad):
    tensors, options = arguments(1, 22, 2, 1, **options)
    before, _ = run(tensors, options)
    for j in (2, 9, 13):
        changed = tensors | {name: tensors[name].clone() for name in ("k", "v")}
        changed["k"][:, j], changed["v"][:, j] = bad, bad
        after, _ = run(changed, options)
        assert torch.equal(after[:, :j], before[:, :j])
        assert not torch.equal(after[:, j], before[:, j])


@each_merge
def test_sums_are_those_of_weighted_tokens(merge):
    """Recounted from where tokens went: a slot holds the weighted sums and the total weight of its tokens."""
    tensors, options = arguments(1, 43, 2, 2, num_slots=7, merge=merge, weights="positive")
    _, state = run(tensors, options, [11, 32])
    k, v, weights = (tensors[name] for name in ("k", "v", "token_weights"))
    del options["scale"]
    found = slot_assignments(k, v, token_weights=weights, **options)
    assert bool((found.slots[:, :, :40] >= 0).all())
    assert bool((found.slots[:, :, 40:] == -1).all())
    assert torch.equal(found.state.count, state.count)
    for h in range(2):
        slots, w = found.slots[0, h, :40], weights[0, :40, h]
        for name, x in (("key_sum", k), ("value_sum", v)):
            total = torch.zeros_like(getattr(state, name)[0, h])
            total.index_add_(0, slots, w[:, None] * x[0, :40, h])
            torch.testing.assert_close(getattr(state, name)[0, h], total)
        total = torch.zeros_like(state.weight[0, h]).index_add(0, slots, w)
        torch.testing.assert_close(state.weight[0, h], total)
    # Part of the stream read before: tokens that were pending then are among those of the state.
    half = {name: x[:, :19] for name, x in tensors.items() if name != "q"}
    first = slot_assignments(**half, **options).state
    rest = {name: x[:, 19:] for name, x in tensors.items() if name != "q"}
    second = slot_assignments(**rest, **options, initial_state=first)
    assert torch.equal(second.earlier_pending[0, :, :3], found.slots[0, :, 16:19])
    assert torch.equal(second.after(5), found.after(24)[:, :, 19:])


def check_zeros(tensors, options, end):
    """Other keys and values of tokens of weight 0 change nothing, to the last bit, after the first `end`."""
    is_zero = tensors["token_weights"][0, :, 0] == 0
    assert 5 < int(is_zero[:end].sum()) < end - 5
    is_zero[end:] = False
    changed = tensors | {name: tensors[name].clone() for name in ("k", "v")}
    for name in ("k", "v"):
        changed[name][:, is_zero] = 3 - changed[name][:, is_zero]
    (o, state), (other, other_state) = (attend(**each, **options) for each in (tensors, changed))
    assert torch.equal(o[:, end:], other[:, end:])
    assert not torch.equal(o[:, :end], other[:, :end])
    for name in ("key_sum", "value_sum", "weight"):
        assert torch.equal(getattr(state, name), getattr(other_state, name))


@each_merge
def test_a_weight_of_zero_leaves_no_trace(merge):
    check_zeros(*arguments(1, 40, 2, 1, num_slots=9, merge=merge, weights="some zero"), 28)


@pytest.mark.parametrize("factor", [1e6, 1e12])
@each_merge
def test_heavy_tokens_whose_keys_repeat(merge, factor):
    """What rounding leaves of a distance of zero would cost something, times such a weight."""
    tensors, options = arguments(1, 60, 1, 1, num_slots=9, merge=merge, weights="positive")
    choice = torch.randint(6, (60,), generator=torch.Generator().manual_seed(0))
    tensors |= {"k": tensors["k"][:, choice], "v": tensors["v"][:, choice]}
    tensors["token_weights"][:, ::3] *= factor
    (_, expected), (_, found) = (run(tensors, options, backend=name) for name in ("naive", "torch"))
    assert_same_state(found, expected, tolerance=1e-9)


@each_merge
def test_weights_of_one_change_nothing(merge):
    tensors, options = arguments(1, 30, 2, 1, merge=merge, weights="one")
    o, state = run(tensors, options)
    del tensors["token_weights"]
    plain, plain_state = run(tensors, options)
    torch.testing.assert_close(o, plain, rtol=1e-12, atol=1e-12)
    assert torch.equal(state.weight, plain_state.count.double())
    # A stream that was begun without weights goes on with them.
    first, rest = ({name: x[:, part] for name, x in tensors.items()} for part in (slice(13), slice(13, 30)))
    _, before = attend(**first, **options)
    weights = torch.ones(1, 17, 1, dtype=torch.float64)
    after, final = attend(**rest, **options, initial_state=before, token_weights=weights)
    torch.testing.assert_close(after, plain[:, 13:], rtol=1e-12, atol=1e-12)
    assert torch.equal(final.weight, state.weight)


def check_rewinding(backend, merge, length=24):
    """Beside a weight of 1e-9, the rounding of a float32 sum would be all there is."""
    q, k, v = inputs(1, length, 1, 1, 4, 3)
    weights = torch.full((1, length, 1), 1.0)
    weights[:, :4] = 1e-9
    grads = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "torch")):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, weights)]
        # The scale makes the gradients of tokens of little weight large enough to be compared.
        options = {"num_slots": 1, "chunk_size": 4, "merge": merge, "backend": name, "scale": 30.0}
        o, _ = ovq_attention(*leaves[:3], token_weights=leaves[3], **options)
        grads.append(torch.autograd.grad(o[:, 4:8].sum(), leaves[:3]))
    for grad, reference in zip(*grads, strict=True):
        assert bool(reference.any())
        torch.testing.assert_close(grad.double(), reference, rtol=1e-4, atol=1e-5)


def test_rewinding_slots_of_little_weight_loses_nothing():
    check_rewinding("torch", "existing")


def test_the_backward_keeps_a_bounded_number_of_rows_per_token():
    """Twice the tokens need twice the memory, whatever the dictionary."""

    def saved(length):
        tensors, options = arguments(1, length, 1, 1, num_slots=64, weights="positive", merge="nearest")
        leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            run(leaves, options, backend="torch")
        return sum(sizes)

    few, many, most = (saved(n) for n in (80, 160, 320))
    rows = (5 + 3) * 1.0  # numbers in a row of keys and values
    assert (most - many) / 160 < 8 * rows
    assert abs((most - many) / (many - few) - 2) < 0.3


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"token_weights": torch.ones(1, 8, 1), "ablation": {"rate": 0.5}}, "none with a constant rate"),
        ({"token_weights": torch.ones(1, 8)}, r"token_weights: expected a tensor \[1, 8, 1\] as k has"),
        (
            {"token_weights": torch.ones(1, 8, 1, dtype=torch.int64)},
            "token_weights: expected a floating dtype",
        ),
        ({"token_weights": -torch.ones(1, 8, 1)}, "token_weights: expected finite .* at least 0, found -1.0"),
        ({"token_weights": torch.ones(1, 8, 1) / 0}, "token_weights: expected finite .* found inf"),
    ],
    ids=str,
)
def test_bad_weights_are_refused(option, message):
    q, k, v = inputs(1, 8, 1, 1)
    with pytest.raises(ValueError, match=message):
        ovq_attention(q, k, v, **{"num_slots": 8, "chunk_size": 4, **option})


@each_option
def test_operations_on_states(options, tmp_path):
    tensors, options = arguments(3, 18, 2, 1, merge="nearest", **options)
    first = {name: x[:, :14] for name, x in tensors.items()}
    _, state = attend(**first, **options)
    state.save(tmp_path / "state")
    loaded = OVQState.load(tmp_path / "state")
    assert loaded.nbytes == state.nbytes
    joined = OVQState.concatenate([state.select([2, 0]), loaded.select([1])])
    rest = {name: x[[2, 0, 1], 14:] for name, x in tensors.items()}
    expected, _ = run(tensors, options)
    for each in (joined, loaded.reorder(torch.tensor([2, 0, 1])), joined.clone().detach().to("cpu")):
        o, _ = attend(**rest, **options, initial_state=each)
        torch.testing.assert_close(o, expected[[2, 0, 1], 14:], rtol=1e-9, atol=1e-9)
    twice = state.repeat_interleave(2)
    assert twice.nbytes == 2 * state.nbytes
    plain = dataclasses.replace(state, weight=None, pending_weights=None)
    assert OVQState.concatenate([plain, state]).weight is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1.0}, "expected numbers of at least 0 in weight, found others"),
        ({"pending_weights": torch.inf}, "expected finite values in pending_weights, found NaN or Inf"),
        ({"weight": 2.0}, "expected a weight of 0 for spare slots"),
        ({"count": 9}, "expected counts that add up"),
    ],
    ids=str,
)
def test_damaged_files_are_refused(change, message, tmp_path):
    tensors, options = arguments(1, 18, 2, 1, weights="positive")
    _, state = attend(**tensors, **options)
    state = with_capacity(state, 7)
    for name, value in change.items():
        x = getattr(state, name).clone()
        x[..., 0 if name != "weight" or value < 0 else -1] = value
        state = dataclasses.replace(state, **{name: x})
    state.save(tmp_path / "state")
    with pytest.raises(ValueError, match=message):
        OVQState.load(tmp_path / "state")
