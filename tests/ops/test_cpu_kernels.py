"""The compiled kernels: against the reference, and in teams of threads."""

import pytest
import torch

from ovq.ops import OVQState, backend_used, cpu_kernels, ovq_attention
from ovq.ops.backends.cpu import build
from ovq.ops.schedule import GROWTHS
from tests.ops.common import KERNEL_MERGES, assert_same_state, attend, by_turns, either_rule, inputs
from tests.ops.test_identities import causal
from tests.ops.test_parity import SHAPES, gradients
from tests.ops.test_routing import near_ties, novelty_ties

needs_compiler = pytest.mark.skipif("compiled" not in cpu_kernels(), reason=cpu_kernels())
# Heads wider than a vector, dictionaries and chunks wider than a tile of the products.
WIDE = [(1, 300, 3, 1, 70, 33, 150, 140), (1, 170, 2, 2, 64, 64, 40, 32)]


@needs_compiler
def test_a_kernel_without_memory_for_its_scratch_is_an_error():
    for name in build._WITH_SCRATCH:
        kernel = getattr(build.load(), name)
        assert kernel.errcheck(0, kernel, ()) is None
        with pytest.raises(MemoryError, match=f"{name}: no memory for the kernel's scratch"):
            kernel.errcheck(1, kernel, ())


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "growth", "merge"), by_turns([*SHAPES, *WIDE], GROWTHS, KERNEL_MERGES), ids=str
)
def test_kernels_equal_naive(shape, growth, merge, runs):
    *sizes, num_slots, chunk_size = shape
    q, k, v = inputs(*sizes, dtype=torch.float32)
    scale = torch.linspace(1, 4, q.shape[2])
    options = {
        "num_slots": num_slots,
        "chunk_size": chunk_size,
        "growth": growth,
        "merge": merge,
    }
    o, state, grads = gradients("cpu", q, k, v, scale, options)
    assert runs == ["ovq_forward", "ovq_backward"]
    o_ref, state_ref, grads_ref = gradients("naive", q, k, v, scale, options)
    # Same tokens added in the same order: equal to the last bit.
    assert_same_state(state, state_ref, tolerance=0)
    torch.testing.assert_close(o, o_ref, rtol=2e-5, atol=2e-5)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        bound = 2e-5 * max(1, float(grad_ref.abs().max()))
        torch.testing.assert_close(grad, grad_ref, rtol=2e-5, atol=bound)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("batch", "kv_heads", "merge"),
    [
        *((*sizes, "existing") for sizes in ((1, 1), (3, 1), (2, 2), (1, 7))),
        *((*sizes, "nearest") for sizes in ((1, 1), (2, 2))),
    ],
)
def test_any_number_of_threads_shares_any_number_of_streams(threads, batch, kv_heads, merge):
    """Streams are divided among teams of threads: the same outputs and gradients, whatever the division."""
    q, k, v = inputs(batch, 150, 2 * kv_heads, kv_heads, 16, 16, dtype=torch.float32)
    scale = torch.full((2 * kv_heads,), 4.0)
    options = {"num_slots": 40, "chunk_size": 64, "merge": merge}
    before = torch.get_num_threads()
    expected = gradients("cpu", q, k, v, scale, options)
    torch.set_num_threads(threads)
    try:
        o, state, grads = gradients("cpu", q, k, v, scale, options)
    finally:
        torch.set_num_threads(before)
    assert_same_state(state, expected[1], tolerance=0)
    torch.testing.assert_close(o, expected[0])
    for grad, grad_ref in zip(grads, expected[2], strict=True):
        torch.testing.assert_close(grad, grad_ref, rtol=1e-4, atol=1e-4)


def state_of(means, num_slots, chunk_size):
    """A state whose slots `[streams, n, K]` hold one token each."""
    streams, n, dim = means.shape
    state = OVQState.empty(
        batch_size=streams,
        num_kv_heads=1,
        key_dim=dim,
        value_dim=1,
        num_slots=num_slots,
        chunk_size=chunk_size,
        dtype=torch.float32,
        device=means.device,
    )
    state.key_sum, state.value_sum = means[:, None].clone(), torch.zeros(streams, 1, n, 1)
    state.count = torch.ones(streams, 1, n, dtype=torch.int64)
    # One chunk has been merged, as far as the op is concerned.
    state.num_seen = torch.full((streams,), chunk_size, dtype=torch.int64)
    return state


def learned(keys, means, num_slots):
    """The state once a chunk of `keys` `[streams, C, K]` has been learned."""
    keys = keys[:, :, None]
    values = torch.arange(1.0, keys.shape[1] + 1)[None, :, None, None].expand(len(keys), -1, 1, 1)
    options = {"num_slots": num_slots, "chunk_size": keys.shape[1], "growth": "immediate"}
    before = state_of(means, num_slots, keys.shape[1])
    return attend(keys, keys, values, initial_state=before, backend="cpu", **options)[1]


@needs_compiler
def test_near_ties_are_decided_as_in_float64(runs):
    keys, means = near_ties()
    exact = (keys.double()[:, :, None] * means.double()[:, None]).sum(-1).argmax(-1)
    assert not torch.equal((keys @ means.transpose(1, 2)).argmax(-1), exact)
    state = learned(keys, means, means.shape[1])
    for row, slots in enumerate(exact):
        assert torch.equal(state.count[row, 0] - 1, slots.bincount(minlength=means.shape[1]))
    assert runs == ["ovq_forward"]


@needs_compiler
def test_near_ties_of_novelty_are_decided_as_in_float64():
    keys, means, expected = novelty_ties()
    state = learned(keys, means, 2 + len(expected))
    # Each token's value is its position, from 1 on.
    assert torch.equal(state.value_sum[0, 0, 2:, 0].long() - 1, expected)


@needs_compiler
@either_rule
def test_keys_that_are_not_finite_harm_their_own_stream_alone(merge):
    q, k, v = inputs(2, 64, 1, 1, 8, 4, dtype=torch.float32)
    for t, x in ((5, torch.nan), (20, torch.inf), (21, -torch.inf), (40, torch.nan)):
        k[0, t, 0, 3] = x
    options = {"num_slots": 16, "chunk_size": 16, "merge": merge}
    states = [attend(q, k, v, backend=b, **options) for b in ("naive", "cpu")]
    (o_ref, state_ref), (o, state) = states
    assert torch.equal(state.count, state_ref.count)
    assert torch.equal(state.value_sum, state_ref.value_sum)
    torch.testing.assert_close(o[1], o_ref[1])
    # What attends to nothing of it is as good as ever.
    torch.testing.assert_close(o[0, :5], o_ref[0, :5])
    assert o[0, 5].isnan().all()


@needs_compiler
def test_tensors_may_lie_in_memory_as_they_like():
    q, k, v = inputs(2, 50, 4, 2, 8, 8, dtype=torch.float32)
    expected, _ = attend(q, k, v, num_slots=8, chunk_size=8)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    by_vector = [torch.stack([x, -x], -1)[..., 0] for x in (q, k, v)]
    for tensors in (apart, by_vector):
        assert not tensors[0].is_contiguous()
        assert torch.equal(attend(*tensors, num_slots=8, chunk_size=8)[0], expected)
    weights = torch.randn(8).expand(2, 50, 4, 8)
    grads = []
    for grad_o in (weights, weights.contiguous()):
        leaf = q.clone().requires_grad_()
        attend(leaf, k, v, num_slots=8, chunk_size=8)[0].backward(grad_o)
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@needs_compiler
def test_scores_of_any_size():
    """Exponentials far below what float32 holds are zero, and those of great scores do not overflow."""
    q, k, v = inputs(1, 90, 1, 1, 8, 4, dtype=torch.float32)
    for scale in (1e-3, 30.0, 1e4):
        o, _ = attend(q, k, v, scale=scale, num_slots=20, chunk_size=16)
        exact, _ = attend(*(x.double() for x in (q, k, v)), scale=scale, num_slots=20, chunk_size=16)
        torch.testing.assert_close(o.double(), exact, rtol=1e-3, atol=1e-6 * max(1, scale))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("j", [0, 7, 8, 19, 36])
@either_rule
def test_causality_bit_for_bit(dtype, j, merge):
    causal("cpu", dtype, j, {"merge": merge})


@needs_compiler
@either_rule
def test_bit_identical_run_to_run(merge):
    q, k, v = inputs(2, 50, dtype=torch.float32)
    options = {"num_slots": 9, "chunk_size": 8, "merge": merge, "backend": "cpu"}
    (first, state), (again, state_again) = (attend(q, k, v, **options) for _ in range(2))
    assert torch.equal(first, again)
    assert_same_state(state_again, state, tolerance=0)


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "options", "expected"),
    [
        (torch.float64, {}, "expected a dtype of .*found torch.float64"),
        (torch.float32, {"ablation": {"bias": "count+norm"}}, r"expected bias 'count', found 'count\+norm'"),
        (torch.float32, {"ablation": {"rate": 0.5}}, "expected rate 'count', found 0.5"),
    ],
)
def test_what_the_kernels_do_not_do_is_refused_or_left_to_torch(dtype, options, expected):
    q, k, v = inputs(1, 8, dtype=dtype)
    options = {"num_slots": 8, "chunk_size": 4, **options}
    with pytest.raises(ValueError, match=f"backend: 'cpu': {expected}"):
        attend(q, k, v, backend="cpu", **options)
    attend(q, k, v, **options)
    assert backend_used() == "torch"


@needs_compiler
@either_rule
def test_auto_takes_them_for_one_token_at_a_time_as_well(merge):
    q, k, v = inputs(1, 8, dtype=torch.float32)
    options = {"num_slots": 8, "chunk_size": 4, "merge": merge}
    # Three steps short of a chunk, so that the last of the steps below merges one.
    _, state = attend(*(x[:, :5] for x in (q, k, v)), **options)
    assert backend_used() == "cpu"
    by_torch = state
    for t in range(5, 8):
        one = [x[:, t : t + 1] for x in (q, k, v)]
        o, state = attend(*one, initial_state=state, **options)
        assert backend_used() == "cpu"
        o_torch, by_torch = attend(*one, initial_state=by_torch, backend="torch", **options)
        torch.testing.assert_close(o, o_torch)
        assert_same_state(state, by_torch, tolerance=0)
    assert state.num_pending.tolist() == [0]


@needs_compiler
@pytest.mark.parametrize("grads", [False, True], ids=["forward", "backward"])
def test_bfloat16_is_as_good_as_exact_attention_in_bfloat16(grads):
    """Where pairs are multiplied, too: no farther from float64 than twice what PyTorch's attention is."""
    q, k, v = inputs(1, 512, 2, 2, 64, 64, dtype=torch.bfloat16)
    options = {"num_slots": 160, "chunk_size": 64}

    def attention(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*heads_first, is_causal=True, scale=8.0).transpose(1, 2)

    def op(q, k, v):
        return ovq_attention(
            q, k, v, scale=8.0, backend="torch" if q.dtype == torch.float64 else "cpu", **options
        )[0]

    errors = []
    for function in (op, attention):
        results = []
        for dtype in (torch.bfloat16, torch.float64):
            leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
            o = function(*leaves)
            weights = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view_as(o).to(torch.bfloat16)
            results.append(torch.autograd.grad(o, leaves, weights.to(dtype)) if grads else (o.detach(),))
        errors.append([float((a.double() - b).norm() / b.norm()) for a, b in zip(*results, strict=True)])
    for error, reference in zip(*errors, strict=True):
        assert 0 < error < 2 * reference


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keys_close_together_are_told_apart(dtype):
    """Rough products tell none of these keys from another; assignments are those of float64 all the same."""
    _, k, v = inputs(1, 300, 1, 1, 24, 4, dtype=torch.float64)
    k = torch.nn.functional.normalize(k[:, :1] + 0.03 * k, dim=-1).to(dtype)
    options = {"num_slots": 40, "chunk_size": 50}
    states = [attend(k, k, v.to(dtype), backend=name, **options)[1] for name in ("naive", "cpu")]
    assert_same_state(*reversed(states), tolerance=0)


@needs_compiler
def test_kernels_need_no_library_of_cpp(made):
    """They allocate by their own arena; with `new`, those that a C driver has linked could not be loaded."""
    assert [name for name in (b"_Znwm", b"_Znam", b"_ZSt7nothrow") if name in made] == []
