"""The `torch` backend against the reference: outputs, final state and every gradient."""

import dataclasses
import functools
import inspect
import itertools

import pytest
import torch

from ovq.ops import ovq_attention
from ovq.ops.options import CURRENT_MERGES
from ovq.ops.schedule import GROWTHS
from tests.ops.common import (
    CPU,
    RULES,
    SCORINGS,
    VARIANTS,
    assert_same_state,
    attend,
    inputs,
    takes,
    with_gradients,
    with_rules,
)

# batch, length, heads, kv_heads, key_dim, value_dim, num_slots, chunk_size: odd sizes, grouped heads, chunks
# longer than the input, dictionaries of one slot and larger than the input.
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 20, 1, 1, 4, 4, 8, 4),
    (2, 37, 4, 2, 8, 6, 16, 8),
    (3, 37, 6, 2, 7, 3, 5, 7),
    (1, 9, 2, 2, 3, 5, 64, 16),
    (2, 64, 2, 2, 8, 8, 16, 16),
    (1, 70, 3, 1, 5, 9, 100, 9),
    (2, 33, 2, 1, 6, 6, 1, 5),
]
# Options of gradcheck.
FAST = {"fast_mode": True, "rtol": 1e-6, "atol": 1e-7}


def gradients(backend, q, k, v, scale, options):
    """`with_gradients` of one call of a backend."""
    return with_gradients({"q": q, "k": k, "v": v}, options | {"scale": scale, "backend": backend})


# A third of all combinations, by turns: each shape with each growth and each rule, and with ways to score.
CHOICES = [
    *((growth, *rules, {}) for growth, rules in itertools.product(GROWTHS, RULES)),
    *(
        ("plateau", "novelty", merge, scoring)
        for scoring, merge in itertools.product(SCORINGS[1:], CURRENT_MERGES[:2])
    ),
]
COMBINED = [
    (shape, *choices)
    for (i, shape), (j, choices) in itertools.product(enumerate(SHAPES), enumerate(CHOICES))
    if (i + j) % 3 == 0
]
COMBINED += [
    (shape, "immediate", "novelty", "nearest", {"ablation": {"bias": "count+norm"}, "value_weight": 2.0})
    for shape in SHAPES
]


@pytest.mark.parametrize(("shape", "growth", "init", "merge", "variant"), COMBINED, ids=str)
def test_torch_equals_naive(shape, growth, init, merge, variant):
    *sizes, num_slots, chunk_size = shape
    q, k, v = inputs(*sizes)
    scale = torch.linspace(1, 4, q.shape[2], dtype=q.dtype)
    options = {
        "num_slots": num_slots,
        "chunk_size": chunk_size,
        "growth": growth,
        "init": init,
        "merge": merge,
        **variant,
        "generator": torch.Generator().manual_seed(3),
    }
    o, state, grads = gradients("torch", q, k, v, scale, options)
    o_ref, state_ref, grads_ref = gradients("naive", q, k, v, scale, options)
    torch.testing.assert_close(o, o_ref, rtol=1e-9, atol=1e-9)
    assert_same_state(state, state_ref)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        torch.testing.assert_close(grad, grad_ref, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradient_of_an_initial_state(variant):
    q, k, v = inputs(2, 41, 4, 2)
    options = {"num_slots": 12, "chunk_size": 8, **variant}
    results = []
    for backend in ("naive", "torch"):
        first = [t[:, :19].clone().requires_grad_() for t in (q, k, v)]
        _, state = attend(*first, backend=backend, **options)
        o, state = attend(q[:, 19:], k[:, 19:], v[:, 19:], initial_state=state, backend=backend, **options)
        loss = o.square().sum() + state.value_sum.sin().sum()
        results.append(torch.autograd.grad(loss, first[1:]))
    for grad, grad_ref in zip(*reversed(results), strict=True):
        assert grad_ref.abs().max() > 1e-3
        torch.testing.assert_close(grad, grad_ref, rtol=1e-9, atol=1e-9)


def test_gradient_of_each_part_of_an_initial_state_for_one_more_token():
    """A single token is decoded without a graph, but not if anything of the state needs a gradient."""
    q, k, v = inputs(1, 20, 2, 1)
    options = {"num_slots": 6, "chunk_size": 8}
    _, state = attend(q[:, :19], k[:, :19], v[:, :19], **options)
    for name in ("key_sum", "value_sum", "pending_keys", "pending_values"):
        grads = []
        for backend in ("naive", "torch"):
            part = getattr(state, name).clone().requires_grad_()
            before = dataclasses.replace(state, **{name: part})
            o, _ = attend(q[:, 19:], k[:, 19:], v[:, 19:], initial_state=before, backend=backend, **options)
            grads += torch.autograd.grad(o.square().sum(), part)
        assert grads[0].abs().max() > 1e-3, name
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradcheck(variant):
    """Finite differences: steps of 1e-6 leave the assignments of these inputs as they are.

    In a random direction for all outputs together, where a wrong entry shows as well, with a bound below
    the usual one.
    """
    q, k, v = (t.requires_grad_() for t in inputs(1, 11, 2, 1, 3, 2, seed=5))
    scale = torch.tensor([1.5, 2.5], dtype=torch.float64, requires_grad=True)

    def call(q, k, v, scale):
        o, state = attend(q, k, v, scale=scale, num_slots=4, chunk_size=3, **variant)
        return o, state.key_sum, state.value_sum, state.pending_keys

    assert torch.autograd.gradcheck(call, (q, k, v, scale), **FAST)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradcheck_of_an_initial_state(variant):
    q, k, v = inputs(1, 18, 2, 1, 3, 2, seed=6)
    options = {"num_slots": 6, "chunk_size": 4, **variant}
    _, state = attend(q[:, :10], k[:, :10], v[:, :10], **options)
    parts = [state.key_sum, state.value_sum, state.pending_keys, state.pending_values]

    def call(*parts):
        names = ("key_sum", "value_sum", "pending_keys", "pending_values")
        for name, part in zip(names, parts, strict=True):
            setattr(state, name, part)
        o, after = attend(q[:, 10:], k[:, 10:], v[:, 10:], initial_state=state, **options)
        return o, after.key_sum, after.value_sum

    assert torch.autograd.gradcheck(call, [p.clone().requires_grad_() for p in parts], **FAST)


@functools.cache
def naive(dtype, sizes, options, is_wide=False, has_gradients=False):
    """What the reference gives for `inputs(*sizes)` in `dtype`: once for all backends compared with it."""
    tensors = [x.double() if is_wide else x for x in inputs(*sizes, dtype=dtype)]
    if not has_gradients:
        return attend(*tensors, **dict(options), backend="naive")
    scale = torch.full((sizes[2],), 4.0, dtype=tensors[0].dtype)
    return gradients("naive", *tensors, scale, dict(options))


def fast(*dtypes):
    """Each fast backend with each dtype and variant that it takes."""
    cases = itertools.product(("torch", *CPU), dtypes, VARIANTS)
    return pytest.mark.parametrize(
        ("backend", "dtype", "variant"), [case for case in cases if takes(*case)], ids=str
    )


@fast(torch.float32, torch.bfloat16, torch.float16)
def test_lower_precision_is_as_good_as_plain_pytorch(backend, dtype, variant):
    """Error against float64 at most twice that of plain attention in the same dtype."""
    sizes, options = (1, 96, 4, 2, 16, 16), {"num_slots": 24, "chunk_size": 16, **variant}
    q, k, v = inputs(*sizes, dtype=dtype)
    o, _ = attend(q, k, v, backend=backend, **options)
    assert o.dtype == dtype
    exact, _ = naive(dtype, sizes, tuple(options.items()), is_wide=True)
    error = (o.double() - exact).abs().max()

    keys, values = (t.repeat_interleave(2, 2).transpose(1, 2) for t in (k, v))
    scores = (q.transpose(1, 2) @ keys.transpose(2, 3)) * 4
    future = torch.ones(96, 96, dtype=torch.bool).triu(1)
    plain = scores.masked_fill(future, -torch.inf).softmax(-1) @ values
    reference = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2).double(), keys.double(), values.double(), is_causal=True, scale=4
    )
    assert error <= 2 * (plain.double() - reference).abs().max()


@pytest.mark.parametrize(("length", "heads", "chunk_size"), [(73, 4, 16), (285, 2, 260)])
@fast(torch.float32, torch.bfloat16)
def test_gradients_in_lower_precision(backend, dtype, variant, length, heads, chunk_size):
    """With an odd number of tokens at the end, and more queries in a chunk than kernels take at once."""
    bound = 0.03 if dtype == torch.bfloat16 else 2e-6 if length < 100 else 8e-6
    sizes = (1, length, heads, heads // 2, 16, 16)
    options = {"num_slots": 16, "chunk_size": chunk_size, **variant}
    _, _, grads = gradients(backend, *inputs(*sizes, dtype=dtype), torch.full((heads,), 4.0), options)
    _, _, exact = naive(dtype, sizes, tuple(options.items()), is_wide=True, has_gradients=True)
    for grad, reference in zip(grads, exact, strict=True):
        error = (grad.double() - reference).norm() / reference.norm()
        assert error < bound


MANY = (2, 100, 2, 1, 8, 8), {"num_slots": 32, "chunk_size": 20}


@fast(torch.float32, torch.bfloat16)
def test_assignments_are_equal_between_backends_in_every_dtype(backend, dtype, variant):
    sizes, options = MANY[0], {**MANY[1], **variant}
    _, state = attend(*inputs(*sizes, dtype=dtype), backend=backend, **options)
    _, expected = naive(dtype, sizes, tuple(options.items()))
    assert torch.equal(state.count, expected.count)
    # Same tokens added in the same order: not merely close.
    assert torch.equal(state.key_sum, expected.key_sum)


@with_rules(["backend"], ["torch", *CPU], rules=CURRENT_MERGES)
def test_sums_are_added_in_order_of_position(merge, backend):
    """Also in a slot that the chunk itself opened, be it later than the tokens merged into it."""
    sizes, options = MANY[0], {**MANY[1], **({} if merge == "existing" else {"merge": merge})}
    _, state = attend(*inputs(*sizes, dtype=torch.float32), backend=backend, **options)
    _, expected = naive(torch.float32, sizes, tuple(options.items()))
    assert torch.equal(state.key_sum, expected.key_sum)
    assert torch.equal(state.value_sum, expected.value_sum)


@with_rules(["backend"], ["torch", *CPU], rules=CURRENT_MERGES)
def test_a_short_call_does_not_pay_for_the_length_of_a_chunk(merge, backend):
    """Buffers for the tokens of such a chunk would take 32 TB."""
    q, k, v = inputs(2, 7, 2, 2, 4, 4, dtype=torch.float32)
    o, expected = (
        ovq_attention(q, k, v, num_slots=4, chunk_size=size, merge=merge, backend=backend)[0]
        for size in (2**40, 8)
    )
    torch.testing.assert_close(o, expected)


def test_signature_is_the_contract():
    parameters = inspect.signature(ovq_attention).parameters
    names = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert names == ["q", "k", "v"]
    # And names that arguments had earlier.
    *by_keyword, rest = list(parameters.values())[3:]
    assert all(p.kind is p.KEYWORD_ONLY for p in by_keyword)
    assert rest.kind is rest.VAR_KEYWORD


@pytest.mark.parametrize("backend", ["naive", "torch", *CPU])
def test_autocast_and_matmul_precision_do_not_reach_routing(backend):
    q, k, v = inputs(1, 200, 2, 2, 8, 8, dtype=torch.float32)
    options = {"num_slots": 32, "chunk_size": 20, "backend": backend}
    expected, _ = attend(q, k, v, **options)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o, _ = attend(q, k, v, **options)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(o, expected)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        o, _ = attend(q, k, v, **options)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert torch.equal(o, expected)
