"""Which gradients there are: zeros of calls without a token, none of gradients but those of the reference."""

import pytest
import torch

from ovq.ops import ovq_attention
from ovq.ops.backends.cpu.tokens import CompiledRMSNorm
from tests.ops.common import BACKENDS, CPU, either_rule, inputs

OPTIONS = {"num_slots": 8, "chunk_size": 4}


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
