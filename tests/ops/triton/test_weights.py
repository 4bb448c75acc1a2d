"""Weights of tokens in the kernels: outputs, sums and every gradient of the reference, decoded tokens."""

import pytest
import torch

from ovq.ops import backend_used, backends, ovq_attention
from ovq.ops.checks import checked_call
from ovq.ops.options import Options
from tests.ops.common import KERNEL_MERGES, assert_same_state, attend, decoded, with_gradients
from tests.ops.test_low_precision import GIVEN, errors
from tests.ops.test_merge_weights import check_rewinding
from tests.ops.test_token_weights import BOUNDS, KINDS, assert_equal_results, call

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")
# numpy, which the interpreter computes with, warns of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

RULES = KERNEL_MERGES
SMALL = (1, 13, 2, 1, 5, 3)


def check(sizes, kind, options, *, dtype=torch.float32, pieces=None, **given):
    """Outputs, state and gradients of the reference; the tensors of the call."""
    tensors = call(sizes, kind, dtype=dtype, **given)
    expected = with_gradients(tensors, options | {"backend": "naive"})
    found = with_gradients(tensors, options | {"backend": "triton"}, pieces)
    assert_equal_results(found, expected, BOUNDS[dtype])
    return tensors


@pytest.mark.parametrize(
    ("merge", "kind"),
    [
        pytest.param(merge, kind, marks=[] if (merge, kind) in QUICK else pytest.mark.slow)
        for QUICK in [{("existing", "some zero"), ("nearest", "some zero")}]
        for merge in RULES
        for kind in KINDS
    ],
)
def test_triton_equals_naive(merge, kind):
    """Two calls, the second from a state: its gradient reaches the weights that the first one merged."""
    check(SMALL, kind, {"num_slots": 4, "chunk_size": 4, "merge": merge}, pieces=[6, 7])


@pytest.mark.slow
@pytest.mark.parametrize("merge", RULES)
def test_rows_heads_and_chunks_of_odd_sizes(merge):
    check(
        (2, 23, 4, 2, 7, 20), "some zero", {"num_slots": 7, "chunk_size": 5, "merge": merge}, pieces=[9, 14]
    )


@pytest.mark.slow
@pytest.mark.parametrize("merge", RULES)
def test_several_blocks_of_slots_and_tokens(merge):
    options = {"num_slots": 70, "chunk_size": 73, "merge": merge}
    check((1, 146, 1, 1, 20, 18), "positive", options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("merge", RULES)
def test_lower_precision(merge, dtype):
    check((1, 22, 2, 1, 16, 8), "some zero", {"num_slots": 8, "chunk_size": 6, "merge": merge}, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_gradients_are_as_exact_as_those_of_keys_and_values(dtype):
    options = {"num_slots": 96, "chunk_size": 128, "scale": 8.0, "backend": "triton", "dtype": dtype}
    found = errors(GIVEN["both"], options, mean=8.0)
    assert bool((found[1:] <= 1.2 * found[2:4].max()).all()), found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("merge", RULES)
def test_keys_that_repeat_and_weights_that_cost_nothing(merge, kind):
    """Of many pairs that cost nothing the order decides, and not all of them are merged."""
    for seed, num_keys in enumerate((2, 5)):
        tensors = call((1, 24, 1, 1, 6, 4), kind, seed=seed, num_keys=num_keys)
        options = {"num_slots": [9, 5][seed], "chunk_size": 8, "merge": merge, "growth": "linear"}
        states = [attend(**tensors, backend=name, **options)[1] for name in ("triton", "naive")]
        assert_same_state(*states, tolerance=0)
        assert torch.equal(states[0].weight, states[1].weight)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-38, 1e-18, 1e12, 1e30])
@pytest.mark.parametrize("merge", RULES)
def test_weights_of_any_size(merge, factor):
    """Some so small or large that products of two vanish or overflow in float32, beside ordinary ones."""
    tensors = call((1, 32, 1, 1, 6, 4), "positive")
    tensors["token_weights"][:, ::3] *= factor
    options = {"num_slots": 12, "chunk_size": 8, "merge": merge}
    states = [attend(**tensors, backend=name, **options)[1] for name in ("triton", "naive")]
    assert_same_state(*states, tolerance=0)
    assert torch.equal(states[0].weight, states[1].weight)


@pytest.mark.parametrize(
    "merge", [x if x == "existing" else pytest.param(x, marks=pytest.mark.slow) for x in RULES]
)
@torch.no_grad()
def test_token_after_token(merge):
    """Two rows whose chunks end at different tokens, on from a state that was read without weights."""
    tensors = call((2, 14, 2, 1, 6, 5), "some zero")
    first = {name: x[:, :10] for name, x in tensors.items() if name != "token_weights"}
    mask = (torch.arange(10) >= torch.tensor([[0], [1]])).long()
    options = {"merge": merge, "num_slots": 5, "chunk_size": 4}
    _, state = attend(**first, attention_mask=mask, backend="naive", **options)
    kept = state.clone()
    rest = {name: x[:, 10:] for name, x in tensors.items()}
    o, after = decoded(rest, state, "triton", **options)
    o_ref, expected = decoded(rest, state, "naive", **options)
    torch.testing.assert_close(o, o_ref, rtol=1e-5, atol=1e-5)
    assert_same_state(after, expected, tolerance=0)
    assert torch.equal(after.weight, expected.weight)
    for row, num in enumerate(expected.num_pending.tolist()):
        assert torch.equal(after.pending_weights[row, :, :num], expected.pending_weights[row, :, :num])
    assert_same_state(state, kept, tolerance=0)


@pytest.mark.parametrize(
    "merge", [x if x == "existing" else pytest.param(x, marks=pytest.mark.slow) for x in RULES]
)
def test_a_weight_of_zero_leaves_no_trace(merge):
    """What such keys and values are changes no bit of the memory, even if it is not a number."""
    tensors = call((1, 12, 1, 1, 5, 3), "positive")
    tensors["token_weights"][:, [0, 3, 5, 9]] = 0
    changed = tensors | {name: tensors[name].clone() for name in ("k", "v")}
    changed["k"][:, [0, 5]], changed["v"][:, [3, 9], 0, 1] = torch.nan, torch.inf
    options = {"num_slots": 5, "chunk_size": 4, "merge": merge, "backend": "triton"}
    states = [attend(**each, **options)[1] for each in (tensors, changed)]
    for name in ("key_sum", "value_sum", "weight"):
        assert torch.equal(*(getattr(state, name) for state in states))


def test_a_stream_that_begins_without_weight():
    """The first key that has weight opens the first slot; a slot that has none attracts no key."""
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6], [-0.6, -0.8], [-1, 0], [0, -1], [1, 0]])
    weights = torch.tensor([0.0, 0, 3, 0, 1, 1, 1, 1])
    tensors = {"q": k, "k": k, "v": torch.arange(8.0)[:, None]}
    tensors = {name: x[None, :, None] for name, x in tensors.items()} | {
        "token_weights": weights[None, :, None]
    }
    options = {"num_slots": 2, "chunk_size": 4, "growth": "immediate"}
    states = [attend(**tensors, backend=name, **options)[1] for name in ("triton", "naive")]
    assert_same_state(*states, tolerance=0)
    assert states[0].weight.flatten().tolist() == [7, 0]
    assert states[0].value_sum[0, 0, 0].item() == 3 * 2 + 4 + 5 + 6 + 7


@pytest.mark.parametrize(
    "merge", [x if x == "existing" else pytest.param(x, marks=pytest.mark.slow) for x in RULES]
)
def test_rewinding_slots_of_little_weight_loses_nothing(merge):
    check_rewinding("triton", merge, length=12)


def test_rows_are_kept_only_for_a_backward(monkeypatch):
    from ovq.ops.backends.triton import chunk

    made = []

    def empty(*args):
        made.append(original(*args))
        return made[-1]

    original = chunk.ChangedSlots.empty
    monkeypatch.setattr(chunk.ChangedSlots, "empty", empty)
    tensors = call((1, 6, 1, 1, 4, 4), "positive")
    for is_leaf in (False, True):
        tensors["token_weights"].requires_grad_(is_leaf)
        attend(**tensors, num_slots=4, chunk_size=3, backend="triton")
    assert [len(kept.keys) for kept in made] == [2]


def test_auto_takes_the_kernels_on_a_gpu_with_weights_too(monkeypatch):
    tensors = call((1, 6, 1, 1, 4, 4), "positive")
    q, k, v, weights = tensors.values()
    options = Options(num_slots=4, chunk_size=3, growth="plateau", init="novelty", merge="nearest", seed=0)
    made = checked_call(q=q, k=k, v=v, scale=torch.ones(1), options=options, token_weights=weights)
    assert backends.refusal("triton", made.q, made.v, made.options, made.gates) is None
    monkeypatch.setattr(backends, "_fastest", lambda x: ("triton", "torch"))
    ovq_attention(q, k, v, token_weights=weights, num_slots=4, chunk_size=3)
    assert backend_used() == "triton"


@pytest.mark.parametrize(
    "merge", [x if x == "existing" else pytest.param(x, marks=pytest.mark.slow) for x in RULES]
)
def test_tokens_that_forget(merge):
    """Where tokens of the own chunk are read with their weights: whole, with gradients, and one by one."""
    tensors = call(SMALL, "some zero")
    draw = torch.rand(*tensors["token_weights"].shape, generator=torch.Generator().manual_seed(2))
    tensors["log_forget"] = -2 * draw
    options = {"num_slots": 4, "chunk_size": 4, "merge": merge}
    expected = with_gradients(tensors, options | {"backend": "naive"})
    found = with_gradients(tensors, options | {"backend": "triton"})
    assert_equal_results(found, expected, BOUNDS[torch.float32])
    with torch.no_grad():
        o, state = decoded(tensors, None, "triton", scale=torch.linspace(1, 4, 2), **options)
    torch.testing.assert_close(o, expected[0], rtol=1e-5, atol=1e-5)
    assert_same_state(state, expected[1], tolerance=1e-6)
