"""Gated DeltaNet and Mamba2 against the recurrences token by token, and against transformers' own."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from ovq.layers import GatedDeltaNet, Mamba2, deltanet, mamba
from ovq.layers.chunked import DecayRates
from ovq.layers.deltanet import gated_delta_rule
from ovq.layers.mamba import state_space_scan
from tests.layers.common import assert_alike_with_gradients


def random_delta_inputs(num_tokens, key_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(num_tokens)

    def random(*shape):
        return torch.randn(2, *shape, dtype=dtype, generator=generator)

    q, k = (F.normalize(random(num_tokens, key_heads, 5), dim=-1) for _ in range(2))
    v, log_decay = random(num_tokens, 2, 3), -random(num_tokens, 2).exp()
    inputs = q, k, v, log_decay, random(num_tokens, 2).sigmoid(), random(2, 5, 3)
    return [x.requires_grad_() for x in inputs]


def delta_rule_token_by_token(q, k, v, log_decay, rate, state):
    outputs = []
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    for t in range(q.shape[1]):
        state = state * log_decay[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], rate[:, t, :, None] * error)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) / q.shape[-1] ** 0.5)
    return torch.stack(outputs, 1), state


def scan_token_by_token(x, log_decay, b, c, state):
    outputs = []
    for t in range(x.shape[1]):
        state = state * log_decay[:, t, :, None, None].exp() + torch.einsum("bn,bhp->bhnp", b[:, t], x[:, t])
        outputs.append(torch.einsum("bn,bhnp->bhp", c[:, t], state))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("num_tokens", [1, deltanet.CHUNK, 2 * deltanet.CHUNK + 5])
@pytest.mark.parametrize("key_heads", [1, 2])
def test_the_delta_rule_in_chunks_equals_it_token_by_token(num_tokens, key_heads):
    inputs = random_delta_inputs(num_tokens, key_heads)
    rules = gated_delta_rule, delta_rule_token_by_token
    assert_alike_with_gradients(inputs, [rule(*inputs) for rule in rules])


@pytest.mark.parametrize("theirs", [torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule])
def test_the_delta_rule_equals_that_of_transformers(theirs):
    q, k, v, log_decay, rate, state = random_delta_inputs(70, dtype=torch.float32)
    found = gated_delta_rule(q, k, v, log_decay, rate, state)
    expected = theirs(q, k, v, g=log_decay, beta=rate, initial_state=state, output_final_state=True)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, mamba.CHUNK, 2 * mamba.CHUNK + 5])
def test_the_scan_in_chunks_equals_it_token_by_token(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (num_tokens, 2, 3), (num_tokens, 2), (num_tokens, 5), (num_tokens, 5), (2, 5, 3)
    inputs = [torch.randn(2, *shape, dtype=torch.float64, generator=generator) for shape in shapes]
    inputs[1] = -inputs[1].exp()
    scans = state_space_scan, scan_token_by_token
    assert_alike_with_gradients([x.requires_grad_() for x in inputs], [scan(*inputs) for scan in scans])


def test_the_layer_equals_mamba2_of_transformers():
    """Same weights, another order of them: z, x, B, C and dt come from one projection there."""
    torch.manual_seed(0)
    ours = Mamba2(32, 4, head_dim=8, state_size=6, conv_size=4)
    theirs = Mamba2Mixer(
        Mamba2Config(
            hidden_size=32,
            num_heads=4,
            head_dim=8,
            expand=1,
            state_size=6,
            n_groups=1,
            conv_kernel=4,
            chunk_size=16,
            use_conv_bias=False,
            use_bias=False,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )
    gate, step = ours.gate_proj.weight.split([32, 4])
    with torch.no_grad():
        torch.nn.init.normal_(ours.skip)
        torch.nn.init.normal_(ours.out_norm.weight)
        theirs.in_proj.weight.copy_(torch.cat([gate, ours.qkv_proj.weight, step]))
        theirs.conv1d.weight.copy_(ours.qkv_conv.weight[:, None])
        theirs.A_log.copy_(ours.rates.A_log)
        theirs.dt_bias.copy_(ours.rates.dt_bias)
        theirs.D.copy_(ours.skip)
        theirs.norm.weight.copy_(ours.out_norm.weight)
        theirs.out_proj.weight.copy_(ours.o_proj.weight)
    x = torch.randn(2, 75, 32)
    torch.testing.assert_close(ours(x)[0], theirs(x), atol=1e-5, rtol=1e-4)


def test_by_their_defaults_they_are_the_published_layers():
    """As in the papers' own code: mamba_ssm's Mamba2(256, headdim=64) and fla's GatedDeltaNet(256)."""
    mamba = Mamba2(256, num_heads=8)
    assert (mamba.num_heads, mamba.head_dim, mamba.state_size, mamba.conv_size) == (8, 64, 128, 4)
    delta = GatedDeltaNet(256, num_heads=2)
    assert (delta.num_kv_heads, delta.head_dim, delta.value_dim, delta.conv_size) == (2, 96, 192, 4)
    # 6 d^2 in projections, what is left being vectors of the heads and the taps.
    for layer in (mamba, delta):
        projections = [m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        assert sum(projections) == pytest.approx(6 * 256**2, rel=0.2)


def test_steps_and_rates_start_where_mamba2_has_them():
    torch.manual_seed(0)
    with torch.no_grad():
        step, log_decay = DecayRates(1000)(torch.zeros(1000))
    assert step.min() == pytest.approx(0.001, rel=0.05)
    assert step.max() == pytest.approx(0.1, rel=0.1)
    rate = -log_decay / step
    assert rate.min() == pytest.approx(1, rel=0.05)
    assert rate.max() == pytest.approx(16, rel=0.05)


def test_the_gates_of_deltanet_are_used():
    torch.manual_seed(0)
    layer, x = GatedDeltaNet(16, 2, conv_size=0), torch.randn(1, 9, 16)
    before = layer(x)[0]
    gate, decay, rate = layer.gate_proj.weight.data.split([2 * layer.value_dim, 2, 2])
    for part in (gate, decay, rate):
        part.mul_(-1)
        assert not torch.allclose(layer(x)[0], before, atol=1e-4)
        part.mul_(-1)
