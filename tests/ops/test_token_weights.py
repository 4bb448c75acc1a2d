"""Weights of tokens in the compiled kernels: against the reference, by every rule of merging."""

import dataclasses

import pytest
import torch

from ovq.ops import slot_assignments
from tests.ops.common import (
    CPU,
    KERNEL_MERGES,
    assert_same_state,
    attend,
    by_turns,
    decoded,
    either_rule,
    inputs,
    with_gradients,
)
from tests.ops.test_merge_weights import check_rewinding, check_rows, check_zeros, token_weights

pytestmark = pytest.mark.skipif(not CPU, reason="no compiled kernels")

# batch, length, heads, kv_heads, key_dim, value_dim, num_slots, chunk_size: odd sizes; a dictionary of one
# slot, and one larger than the input; and a chunk and a dictionary wider than a tile of the products.
SHAPES = [(2, 37, 4, 2, 7, 3, 5, 7), (1, 30, 1, 1, 5, 9, 1, 4), (1, 41, 2, 2, 4, 4, 64, 8)]
WIDE = (1, 140, 2, 1, 33, 20, 50, 60)
KINDS = ["positive", "some zero", "tiny", "all zero"]
# Error allowed in outputs and gradients, over the size of the latter.
BOUNDS = {torch.float32: 3e-5, torch.bfloat16: 0.03, torch.float16: 4e-3}


def call(sizes, kind, *, dtype=torch.float32, seed=0, num_keys=0):
    """Tensors of a call by name; keys and values repeat if there are to be `num_keys` of them."""
    q, k, v = inputs(*sizes, dtype=dtype, seed=seed)
    if num_keys:
        choice = torch.randint(num_keys, (sizes[1],), generator=torch.Generator().manual_seed(seed))
        k, v = k[:, choice], v[:, choice]
    weights = token_weights(kind, sizes[0], sizes[1], sizes[3], seed=seed).float()
    return {"q": q, "k": k, "v": v, "token_weights": weights}


def assert_equal_results(found, expected, bound):
    """Sums, weights and counts to the last bit, since the same tokens were added in the same order."""
    torch.testing.assert_close(found[0], expected[0], rtol=bound, atol=bound)
    assert_same_state(found[1], expected[1], tolerance=0)
    assert torch.equal(found[1].weight, expected[1].weight)
    for grad, reference in zip(found[2], expected[2], strict=True):
        size = max(1.0, float(reference.abs().max()))
        torch.testing.assert_close(grad, reference, rtol=2 * bound, atol=2 * bound * size)


@pytest.mark.parametrize(
    ("shape", "kind", "merge"),
    [
        *by_turns(SHAPES, KINDS, KERNEL_MERGES),
        *zip([WIDE] * 2, ["positive", "some zero"], KERNEL_MERGES, strict=True),
    ],
    ids=str,
)
def test_kernels_equal_naive(shape, kind, merge):
    *sizes, num_slots, chunk_size = shape
    options = {"num_slots": num_slots, "chunk_size": chunk_size, "merge": merge}
    tensors = call(sizes, kind)
    cut = sizes[1] // 2 - 1
    expected = with_gradients(tensors, options | {"backend": "naive"})
    found = with_gradients(tensors, options | {"backend": "cpu"}, [cut, sizes[1] - cut])
    assert_equal_results(found, expected, BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@either_rule
def test_kernels_equal_naive_in_other_dtypes(dtype, merge):
    options = {"num_slots": 24, "chunk_size": 16, "merge": merge}
    tensors = call((2, 70, 2, 1, 32, 32), "some zero", dtype=dtype)
    expected = with_gradients(tensors, options | {"backend": "naive"})
    assert_equal_results(with_gradients(tensors, options | {"backend": "cpu"}), expected, BOUNDS[dtype])


@pytest.mark.parametrize(("seed", "kind", "merge"), by_turns(range(6), KINDS, KERNEL_MERGES))
def test_keys_that_repeat_and_weights_that_cost_nothing(kind, merge, seed):
    """Of many pairs that cost nothing the order decides, and not all of them are merged."""
    chunk_size, num_slots = [(4, 6), (8, 20), (16, 9), (8, 3)][seed % 4]
    options = {"num_slots": num_slots, "chunk_size": chunk_size, "merge": merge}
    options |= {"growth": ["plateau", "linear", "immediate"][seed % 3]}
    tensors = call((1, 60, 1, 1, 6, 4), kind, seed=seed, num_keys=[0, 2, 7][seed % 3])
    states = [attend(**tensors, backend=name, **options)[1] for name in ("naive", "cpu")]
    assert_same_state(*reversed(states), tolerance=0)
    assert torch.equal(states[0].weight, states[1].weight)
    del tensors["q"]
    found = [slot_assignments(**tensors, backend=name, **options) for name in ("torch", "cpu")]
    assert torch.equal(found[0].slots, found[1].slots)
    assert torch.equal(found[0].after(35), found[1].after(35))


@pytest.mark.parametrize("factor", [1e-18, 1e-9, 1e12])
@either_rule
def test_weights_of_any_size(merge, factor):
    """Some so small that the products of two would vanish, beside ordinary ones."""
    options = {"num_slots": 12, "chunk_size": 8, "merge": merge}
    tensors = call((1, 64, 1, 1, 6, 4), "positive")
    tensors["token_weights"][:, ::3] *= factor
    states = [attend(**tensors, backend=name, **options)[1] for name in ("naive", "cpu")]
    assert_same_state(*reversed(states), tolerance=0)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@either_rule
@torch.no_grad()
def test_token_by_token(dtype, merge):
    """Rows at different places, of which some complete a chunk when others do not."""
    options = {"num_slots": 12, "chunk_size": 8, "merge": merge}
    tensors = call((2, 60, 4, 2, 7, 20), "some zero", dtype=dtype)
    mask = torch.arange(40) < torch.tensor([40, 33])[:, None]
    start = attend(**{name: x[:, :40] for name, x in tensors.items()}, attention_mask=mask, **options)[1]
    rest = {name: x[:, 40:] for name, x in tensors.items()}
    found = [decoded(rest, start, backend, **options) for backend in ("torch", "cpu")]
    bound = BOUNDS[dtype]
    torch.testing.assert_close(found[1][0], found[0][0], rtol=bound, atol=bound)
    assert_same_state(found[1][1], found[0][1], tolerance=0)
    assert torch.equal(found[1][1].weight, found[0][1].weight)
    for a, b in zip(*(state.pending_weights[:, :, :4] for _, state in found), strict=True):
        assert torch.equal(a[:, :1], b[:, :1])


def a_step():
    """A state after a decode step, and the arguments of the next one."""
    tensors = call((2, 40, 4, 2, 8, 8), "positive")
    options = {"num_slots": 24, "chunk_size": 16}
    state = None
    for part in (slice(0, 38), slice(38, 39)):
        state = attend(**{name: x[:, part] for name, x in tensors.items()}, initial_state=state, **options)[1]
    return state, {name: x[:, 39:] for name, x in tensors.items()}, options


@torch.no_grad()
def test_a_step_like_the_last_one_is_not_checked_again(monkeypatch):
    state, step, options = a_step()
    plain = dataclasses.replace(state)
    expected, after = attend(**step, initial_state=plain, **options)
    monkeypatch.setattr("ovq.ops.attention.check_qkv", None)
    o, found = attend(**step, initial_state=state, **options)
    torch.testing.assert_close(o, expected)
    assert_same_state(found, after, tolerance=0)
    with pytest.raises(TypeError):
        attend(**step, initial_state=plain, **options)


@torch.no_grad()
def test_a_step_unlike_the_last_one_is_checked():
    state, step, options = a_step()
    weights = step.pop("token_weights")
    for wrong, message in (
        (-weights, "at least 0"),
        (weights * torch.nan, "finite"),
        (weights / 0, "finite"),
        (weights[:, :, :1], r"\[2, 1, 2\]"),
        (weights.long(), "floating dtype"),
    ):
        with pytest.raises(ValueError, match=f"token_weights: expected .*{message}"):
            attend(**step, token_weights=wrong, initial_state=state, **options)
    # Weights of another dtype are as good; without any, each token counts 1.
    for given, same in ((weights.double(), weights), (None, torch.ones_like(weights))):
        (_, found), (_, expected) = (
            attend(**step, token_weights=w, initial_state=state, **options) for w in (given, same)
        )
        assert torch.equal(found.pending_weights[:, :, 7], expected.pending_weights[:, :, 7])
    # A state without weights does not tell a step with them what to do.
    plain = dataclasses.replace(state, weight=None, pending_weights=None)
    plain = attend(**step, initial_state=plain, **options)[1]
    assert plain._step is not None
    _, found = attend(**step, token_weights=weights, initial_state=plain, **options)
    assert found.weight is not None


@pytest.mark.parametrize("merge", ["existing", "nearest"])
def test_rows_alone_padded_and_packed(merge):
    options = {"num_slots": 6, "chunk_size": 4, "merge": merge, "backend": "cpu"}
    rows = [call((1, n, 2, 1, 5, 3), "some zero", seed=n) for n in (22, 5, 13)]
    check_rows(rows, options, 1.3e-6, 0)


@either_rule
def test_teams_of_threads(merge):
    options = {"num_slots": 40, "chunk_size": 64, "merge": merge, "backend": "cpu"}
    tensors = call((1, 150, 2, 1, 16, 16), "some zero")
    before = torch.get_num_threads()
    expected = with_gradients(tensors, options)
    torch.set_num_threads(3)
    try:
        found = with_gradients(tensors, options)
    finally:
        torch.set_num_threads(before)
    assert_equal_results(found, expected, 1e-4)


@either_rule
def test_the_gradients_of_others_need_none_of_weights(merge):
    tensors = call((1, 60, 2, 1, 8, 8), "some zero")
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v")]
    grads = []
    for weights in (tensors["token_weights"], tensors["token_weights"].clone().requires_grad_()):
        given = tensors | {"token_weights": weights}
        o, state = attend(**given, num_slots=12, chunk_size=8, merge=merge, backend="cpu")
        grads.append(torch.autograd.grad(o.sin().sum() + state.weight.sum() + state.key_sum.sum(), leaves))
    assert all(map(torch.equal, *grads))


@either_rule
def test_weights_of_one_change_nothing(merge):
    options = {"num_slots": 12, "chunk_size": 8, "merge": merge, "backend": "cpu"}
    tensors = call((1, 60, 2, 1, 8, 8), "one")
    o, state = attend(**tensors, **options)
    del tensors["token_weights"]
    plain, plain_state = attend(**tensors, **options)
    assert torch.equal(o, plain)
    assert_same_state(state, plain_state, tolerance=0)
    assert torch.equal(state.weight, plain_state.count.float())


@either_rule
def test_a_weight_of_zero_leaves_no_trace(merge):
    options = {"num_slots": 9, "chunk_size": 4, "merge": merge, "backend": "cpu"}
    check_zeros(call((1, 40, 2, 1, 5, 3), "some zero"), options, 36)


@either_rule
def test_rewinding_slots_of_little_weight_loses_nothing(merge):
    check_rewinding("cpu", merge)
