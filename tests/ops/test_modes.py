"""Under a `TorchDispatchMode`, which sees no kernels, PyTorch's operations compute the same instead."""

import functools

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from ovq.layers import OVQAttention, SlidingWindowAttention
from ovq.layers.common import QKNorm, RMSNorm, ShortConvolution, swiglu
from ovq.layers.products import Linear
from ovq.ops import backend_used, ovq_attention
from tests.ops.common import CPU, assert_same_state, either_rule, inputs
from tests.written import seen_by_mode

pytestmark = pytest.mark.skipif(not CPU, reason="no compiler")

OPTIONS = {"num_slots": 12, "chunk_size": 4, "output_final_state": True}


def leaves(length=30):
    return [x.requires_grad_() for x in inputs(2, length, dtype=torch.float32)]


def run(function, given):
    """Outputs and gradients of a function that returns outputs and something more."""
    o, more = function(*given)
    return o, torch.autograd.grad(o.square().sum(), given), more


def flops(function, *given):
    with FlopCounterMode(display=False) as counter:
        found = function(*given)
    return counter.get_total_flops(), found


@either_rule
def test_modes_see_what_kernels_would_compute(merge):
    given, attend = leaves(), functools.partial(ovq_attention, merge=merge, **OPTIONS)
    expected = run(attend, given)
    assert backend_used() == "cpu"
    num, found = flops(run, attend, given)
    assert backend_used() == "torch"
    torch.testing.assert_close(found[:2], expected[:2], atol=1e-4, rtol=1e-4)
    assert_same_state(found[2], expected[2])
    assert num == flops(run, functools.partial(attend, backend="torch"), given)[0] > 0
    with (
        FlopCounterMode(display=False),
        pytest.raises(ValueError, match=r"'cpu': expected no TorchDispatchMode.*, found _?FlopCounterMode"),
    ):
        attend(*given, backend="cpu")


@either_rule
@torch.no_grad()
def test_modes_see_tokens_that_continue_a_prepared_step(merge):
    q, k, v = inputs(2, 30, dtype=torch.float32)

    def decoded(watched):
        """Outputs of tokens, of which a mode sees some, and the last state."""
        o, state = ovq_attention(q[:, :9], k[:, :9], v[:, :9], merge=merge, **OPTIONS)
        outputs = [o]
        for i in range(9, 30):
            given = functools.partial(ovq_attention, merge=merge, initial_state=state, **OPTIONS)
            given = functools.partial(given, q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1])
            num, (o, state) = flops(given) if i in watched else (1, given())
            assert num
            assert backend_used() == ("torch" if i in watched else "cpu")
            outputs.append(o)
        return torch.cat(outputs, 1), state

    (found, state), (expected, other) = decoded(range(12, 22)), decoded(())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert_same_state(state, other)


@either_rule
def test_selective_checkpoints_give_no_wrong_gradient(merge):
    """Memory that a policy keeps is given out again, with what kernels had merged into it."""
    given, aten = leaves(), torch.ops.aten

    def attend(q, k, v):
        return ovq_attention(q, k, v, merge=merge, **OPTIONS)

    def selective(kept):
        context_fn = functools.partial(create_selective_checkpoint_contexts, kept)
        return lambda *x: checkpoint(attend, *x, use_reentrant=False, context_fn=context_fn)

    o, expected, _ = run(attend, given)
    for products in ([aten.mm.default, aten.bmm.default, aten.baddbmm.default], []):
        found = run(selective(products), given)
        torch.testing.assert_close(found[:2], (o, expected), atol=1e-4, rtol=1e-4)
    for kept in (lambda *args, **kwargs: CheckpointPolicy.MUST_SAVE, [aten.clone.default]):
        with pytest.raises(RuntimeError, match="has been mutated"):
            run(selective(kept), given)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 20, 600])
def test_modes_see_the_parts_of_layers(num_tokens):
    torch.manual_seed(0)
    convolution, heads = ShortConvolution(24, 4), QKNorm(1, 8)
    window = SlidingWindowAttention(24, 2, sliding_window=8)
    parts = {
        "norm": RMSNorm(24, eps=1e-6),
        "swiglu": swiglu,
        "linear": Linear(24, 10),
        "heads": lambda x: heads(x, 1)[0],
        "convolution": lambda x: convolution(x)[0],
        "a step of the convolution": lambda x: convolution(x[:, :1], state=x[:, 0, :, None].repeat(1, 1, 3))[
            0
        ],
        "window": lambda x: window(x)[0],
    }
    # Few vectors, which have a kernel of their own, or many.
    x, other = torch.randn(2, 1, num_tokens, 24)
    for name, part in parts.items():
        # What a mode does not see is a constant of its graph.
        torch.testing.assert_close(make_fx(part)(x)(other), part(other), msg=f"{name} gives other numbers")


def test_modes_see_a_layer_forward_and_backward():
    layer, x = OVQAttention(32, 2, num_slots=12, chunk_size=4), torch.randn(1, 40, 32)

    def gradients():
        layer.zero_grad()
        o = layer(x)[0]
        o.square().sum().backward()
        return o, [weight.grad for weight in layer.parameters()]

    expected = gradients()
    torch.testing.assert_close(seen_by_mode(gradients), expected, atol=1e-4, rtol=1e-4)
