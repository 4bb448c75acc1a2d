"""Forgetting attention against its formula, written out token by token."""

import pytest
import torch

from ovq.layers.layout import SequenceLayout
from ovq_lab.mixers.fox import ForgettingAttention, later_sums

HIDDEN, HEADS, STATES, HEAD = 12, 4, 2, 3


def layer_of(**options):
    """A layer in float64 whose gate depends on what it reads."""
    torch.manual_seed(0)
    layer = ForgettingAttention(HIDDEN, HEADS, STATES, HEAD, conv_size=0, **options).double()
    torch.nn.init.normal_(layer.forget_gate.weight)
    return layer


def by_formula(layer, x):
    """The output of one row `x [T, HIDDEN]`, logit by logit."""
    channels = layer.qkv_proj(x).unflatten(-1, (-1, HEAD))
    q, k, v = channels.split([HEADS, STATES, STATES], dim=1)
    q, k = (y / y.norm(dim=-1, keepdim=True) for y in (q, k))
    gate = layer.forget_gate
    factors = (x @ gate.weight.T + gate.bias).sigmoid()
    outputs = []
    for t in range(len(x)):
        heads = []
        for h in range(HEADS):
            g = h // (HEADS // STATES)
            terms = [
                (layer.qk_norm.scale[h] * (q[t, h] @ k[j, g])).exp() * factors[j + 1 : t + 1, g].prod()
                for j in range(t + 1)
            ]
            heads.append(sum(w * v[j, g] for j, w in enumerate(terms)) / sum(terms))
        outputs.append(torch.cat(heads))
    return layer.o_proj(torch.stack(outputs))


def test_the_layer_equals_its_formula_gradients_too():
    layer = layer_of()
    x = torch.randn(1, 9, HIDDEN, dtype=torch.float64, requires_grad=True)
    inputs = (x, *layer.parameters())
    found, expected = layer(x)[0][0], by_formula(layer, x[0])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_from_the_end_logits_are_as_exact_as_at_it(dtype):
    """4,000 fast tokens behind a query add some 4,000 to its logits: what bfloat16 knows to 16."""
    layer = layer_of()
    x = torch.randn(1, 4096, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        layer.forget_gate.bias.fill_(-1.0)
        expected = layer(x)[0][:, :64]
        found = layer.to(dtype)(x.to(dtype))[0][:, :64]
        near = layer(x[:, :64].to(dtype))[0]
    error = (found.double() - expected).abs().max()
    assert error < 1.5 * (near.double() - expected).abs().max() + 1e-3 * (dtype == torch.float32)


def test_a_gate_that_never_forgets_leaves_full_attention():
    layer = layer_of()
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        layer.forget_gate.weight.zero_()
        layer.forget_gate.bias.fill_(1e9)
        layout = SequenceLayout.of(None, batch_size=2, num_past=0, num_new=9)
        q, k, v, scale = layer.heads(layer.qkv_proj(x), layout)
        exact = layer.o_proj(layer.attend(q, k, v, scale, layout, None).flatten(2))
        torch.testing.assert_close(layer(x)[0], exact, atol=1e-12, rtol=0)


def test_nothing_is_behind_the_only_token():
    assert later_sums(torch.ones(1, 1, 1, 1)).tolist() == [[[[0.0]]]]
