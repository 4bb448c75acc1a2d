"""Which gradients there are: zeros of calls without a token, none of gradients but those of the reference."""

import functools
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ovq.layers import OVQAttention
from ovq.layers.products import Linear
from ovq.ops import backend_used, backends, ovq_attention
from ovq.ops.backends.cpu.tokens import CompiledRMSNorm
from ovq.ops.options import CURRENT_MERGES
from tests.ops.common import BACKENDS, CPU, either_rule, inputs
from tests.written import without_kernels

OPTIONS = {"num_slots": 8, "chunk_size": 4}
# PyTorch itself uses it for forward-mode differentiation.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script")


def leaves(batch, length, dtype=torch.float32):
    return [x.requires_grad_() for x in inputs(batch, length, dtype=dtype)]


@pytest.mark.parametrize("backend", [*BACKENDS, *CPU])
@pytest.mark.parametrize("padding", [0.0, float("nan")])
def test_calls_without_a_token_give_gradients_of_zero(backend, padding):
    q, k, v = leaves(2, 5)
    inside = [x + padding for x in (q, k, v)]
    mask = torch.zeros(2, 5, dtype=torch.int64)
    o, state = ovq_attention(
        *inside, attention_mask=mask, backend=backend, output_final_state=True, **OPTIONS
    )
    assert not o.detach().any()
    assert state.num_seen.tolist() == [0, 0]
    for x in torch.autograd.grad(o.sum(), inside):
        assert torch.equal(x, torch.zeros_like(x))
    nothing = [x[:, :0] for x in (q, k, v)]
    o, _ = ovq_attention(*nothing, backend=backend, **OPTIONS)
    for x in torch.autograd.grad(o.sum(), (q, k, v)):
        assert torch.equal(x, torch.zeros_like(x))


@either_rule
@pytest.mark.parametrize("backend", ["torch", *CPU])
def test_gradients_of_gradients_are_refused(backend, merge):
    """Also where the loss is linear in the outputs, so that nothing that reaches the backward has a graph."""
    q, k, v = leaves(1, 12)
    o, _ = ovq_attention(q, k, v, merge=merge, backend=backend, **OPTIONS)
    with pytest.raises(RuntimeError, match=r"expected create_graph=False, found True.*backend='naive'"):
        torch.autograd.grad(o.sum(), (q, k, v), create_graph=True)


@either_rule
def test_the_reference_has_gradients_of_gradients(merge):
    tensors = leaves(1, 9, torch.float64)

    def attend(q, k, v):
        return ovq_attention(q, k, v, merge=merge, backend="naive", **OPTIONS)[0]

    assert torch.autograd.gradgradcheck(attend, tensors, fast_mode=True)


@pytest.mark.skipif(not CPU, reason="no compiler")
def test_compiled_layers_refuse_them_too():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = CompiledRMSNorm.apply(x, weight, 1e-6)
    with pytest.raises(RuntimeError, match="expected create_graph=False"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_layers_have_them_as_the_error_says():
    layer = OVQAttention(8, num_heads=2, backend="naive", **OPTIONS)
    x = torch.randn(1, 9, 8, requires_grad=True)
    if CPU:
        with pytest.raises(RuntimeError, match=r"layers also need OVQ_CPU_KERNELS=0"):
            torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    with without_kernels():
        (grad,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), x)[0].abs().sum() > 0


@FORWARD_MODE
@pytest.mark.parametrize("use_grad", [True, False])
def test_no_tangent_of_forward_mode_differentiation_is_lost(use_grad):
    """Kernels read the plain numbers of tensors, so the reference has to run."""
    layer, x = OVQAttention(16, 2, conv_size=3, **OPTIONS), torch.randn(1, 10, 16)
    ahead, behind = (layer(x + step * x)[0].detach() for step in (1e-2, -1e-2))
    with torch.set_grad_enabled(use_grad), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))[0]).tangent
    assert backend_used() == "naive"
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-2, atol=1e-3, rtol=1e-2)


def test_auto_warns_once_that_the_reference_runs():
    q, k, v = inputs(1, 10, dtype=torch.float32)

    def gradient(**options):
        torch.func.grad(lambda q: ovq_attention(q, k, v, **options, **OPTIONS)[0].sum())(q)
        assert backend_used() == "naive"

    backends._warn_of_loops.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in ({"backend": "naive"}, {"merge": "ward"}):
            gradient(**options)
        assert not caught
        for _ in range(2):
            gradient()
    (warning,) = caught
    assert "'auto' runs the slow loops of 'naive'" in str(warning.message)
    assert warning.filename == __file__


@FORWARD_MODE
@torch.no_grad()
def test_no_tangent_is_lost_in_decoding():
    """Nor where the step before it is repeated."""
    options = OPTIONS | {"output_final_state": True}
    q, k, v = inputs(1, 8, dtype=torch.float32)
    _, state = ovq_attention(q[:, :6], k[:, :6], v[:, :6], **options)
    _, state = ovq_attention(q[:, 6:7], k[:, 6:7], v[:, 6:7], initial_state=state, **options)

    def decoded(v):
        return ovq_attention(q[:, 7:], k[:, 7:], v, initial_state=state, **options)[0]

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(decoded(forward_ad.make_dual(v[:, 7:], v[:, 7:]))).tangent
    torch.testing.assert_close(tangent, decoded(2 * v[:, 7:]) - decoded(v[:, 7:]), atol=1e-5, rtol=1e-4)


@FORWARD_MODE
def test_transforms_that_a_backend_cannot_run_under_are_refused():
    q, k, v = inputs(2, 5, dtype=torch.float32)

    def attend(q, k, v, backend="auto"):
        return ovq_attention(q, k, v, backend=backend, **OPTIONS)[0]

    for backend in ("torch", *CPU):
        with pytest.raises(ValueError, match=f"backend: '{backend}': expected no transform of torch.func"):
            torch.func.jvp(lambda v, name=backend: attend(q, k, v, name), (v,), (v,))
        o = attend(q.requires_grad_(), k, v, backend)
        with pytest.raises(RuntimeError, match="expected is_grads_batched=False, found True"):
            torch.autograd.grad(o, q, o.detach().expand(3, *o.shape), is_grads_batched=True)


@FORWARD_MODE
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gate", [{}, {"merge_gate": True}, {"forget_gate": True}])
def test_transforms_that_hide_values_and_sizes_are_refused(gate):
    layer, x = OVQAttention(16, 2, **OPTIONS, **gate).requires_grad_(False), torch.randn(1, 10, 16)
    with pytest.raises(ValueError, match=r"^expected no torch.func.vmap, found one"):
        torch.func.vmap(lambda x: layer(x)[0])(x[None])
    with pytest.raises(ValueError, match=r"^expected no torch.jit.trace, found one: torch.export"):
        torch.jit.trace(lambda x: layer(x)[0], x)
    with pytest.raises(ValueError, match=r"^expected no make_fx.*torch.func.linearize"):
        torch.func.linearize(lambda x: layer(x)[0], x)
    with pytest.raises(ValueError, match=r"^expected no make_fx"):
        make_fx(lambda x: layer(x)[0], pre_dispatch=True)(x)
    with pytest.raises(ValueError, match=r"^expected no torch.func.functionalize, found one"):
        torch.func.functionalize(lambda x: layer(x)[0])(x)


@FORWARD_MODE
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("has_product", [False, True])
def test_no_derivative_of_a_transform_is_lost_under_compile(has_product):
    """Operators of graphs have none, so calls run without a graph, and projections as PyTorch's product."""
    q, k, v = inputs(1, 10, dtype=torch.float32)
    projection = Linear(q.shape[-1], 3)

    def call(x):
        return projection(x) if has_product else ovq_attention(x, k, v, **OPTIONS)[0]

    def tangent(x):
        return torch.func.jvp(call, (x,), (x,))[1]

    def gradient(x):
        return torch.func.grad(lambda x: call(x).sin().sum())(x)

    for function in (tangent, gradient):
        expected = function(q)
        torch.testing.assert_close(torch.compile(function, backend="aot_eager")(q), expected)
        assert expected.abs().max() > 0.01
    torch._dynamo.reset()


@pytest.mark.parametrize("merge", CURRENT_MERGES)
def test_checkpoints_may_keep_products(merge):
    aten = torch.ops.aten
    context_fn = functools.partial(create_selective_checkpoint_contexts, [aten.mm.default, aten.bmm.default])
    q, k, v = leaves(1, 20, torch.float64)
    # A value that is not finite, and empty slots, are taken out of products.
    values = v + torch.tensor([0.0] * 18 + [torch.inf] * 2)[:, None, None]
    weights = torch.arange(20.0).remainder(3)[None, :, None]

    def attend(q, k, values):
        return ovq_attention(
            q, k, values, merge=merge, token_weights=weights.double(), backend="torch", **OPTIONS
        )[0]

    outputs = (
        attend(q, k, values),
        checkpoint(attend, q, k, values, use_reentrant=False, context_fn=context_fn),
    )
    expected, found = (torch.autograd.grad(o[:, :16].sum(), (q, k, v)) for o in outputs)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
