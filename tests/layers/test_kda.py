"""Kimi Delta Attention against its rule token by token, and what decays per channel are for."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ovq.layers.deltanet import gated_delta_rule
from ovq_lab.mixers import KimiDeltaAttention, kda
from ovq_lab.mixers.kda import decayed_products, kimi_delta_rule
from tests.layers.common import assert_alike_with_gradients, random

HIDDEN, HEAD, VALUE = 12, 5, 3


def make(**options):
    """A float64 layer whose norm and decays are not at their initial values."""
    torch.manual_seed(0)
    layer = KimiDeltaAttention(HIDDEN, 4, 2, HEAD, **{"kda_value_dim": VALUE, "conv_size": 0} | options)
    torch.nn.init.normal_(layer.out_norm.weight, mean=1.0, std=0.3)
    torch.nn.init.normal_(layer.rates.dt_bias)
    return layer.double()


def random_inputs(num_tokens, key_heads=2):
    """What `kimi_delta_rule` takes: channels that stay for long beside channels that soon vanish."""
    q, k = (F.normalize(random(2, num_tokens, key_heads, HEAD, seed=seed), dim=-1) for seed in (1, 2))
    v, log_decay = random(2, num_tokens, 4, VALUE), -(2 * random(2, num_tokens, 4, HEAD)).exp()
    inputs = q, k, v, log_decay, random(2, num_tokens, 4).sigmoid(), random(2, 4, HEAD, VALUE)
    return [x.requires_grad_() for x in inputs]


def rule_token_by_token(q, k, v, log_decay, rate, state):
    """As the paper writes it."""
    outputs = []
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2)[..., None] for x in (q, k))
    for t in range(q.shape[1]):
        key, share = k[:, t], rate[:, t, :, None, None]
        decayed = log_decay[:, t].exp().diag_embed() @ state
        removed = torch.eye(HEAD, dtype=v.dtype) - share * key @ key.transpose(-1, -2)
        state = removed @ decayed + share * key @ v[:, t, :, None]
        outputs.append((state.transpose(-1, -2) @ q[:, t])[..., 0] / HEAD**0.5)
    return torch.stack(outputs, 1), state


def layer_token_by_token(layer, x):
    """The output of a layer without convolution, and its state after the last token."""
    q, k, v = F.silu(x @ layer.qkv_proj.weight.T).split([2 * HEAD, 2 * HEAD, 4 * VALUE], -1)
    decay, gate, rate = (x @ layer.gate_proj.weight.T).split([VALUE, VALUE, 4], -1)
    decay = (decay @ layer.decay_up_proj.weight.T).unflatten(-1, (4, HEAD))
    log_decay = -layer.rates.A_log.exp()[:, None] * F.softplus(decay + layer.rates.dt_bias)
    q, k = (F.normalize(x.unflatten(-1, (2, HEAD)), dim=-1) for x in (q, k))
    inputs = q, k, v.unflatten(-1, (4, VALUE)), log_decay, rate.sigmoid()
    o, state = rule_token_by_token(*inputs, torch.zeros(len(x), 4, HEAD, VALUE, dtype=x.dtype))
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.out_norm.weight
    gate = gate @ layer.gate_up_proj.weight.T + layer.gate_up_proj.bias
    return (o.flatten(2) * gate.sigmoid()) @ layer.o_proj.weight.T, state


@pytest.mark.parametrize("num_tokens", [1, 6, kda.CHUNK, 2 * kda.CHUNK + 5])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_the_rule_in_chunks_equals_it_token_by_token(num_tokens, key_heads):
    inputs = random_inputs(num_tokens, key_heads)
    assert_alike_with_gradients(inputs, [rule(*inputs) for rule in (kimi_delta_rule, rule_token_by_token)])


@pytest.mark.parametrize("num_tokens", [1, kda.CHUNK + 5])
def test_the_layer_equals_the_rule_token_by_token(num_tokens):
    layer, x = make(), random(2, num_tokens, HIDDEN).requires_grad_()
    o, _, cache = layer(x, use_cache=True)
    results = (o, cache.layers[0].state["delta"]), layer_token_by_token(layer, x)
    assert_alike_with_gradients([x, *layer.parameters()], results)


def test_with_one_decay_per_head_it_is_the_rule_of_gated_deltanet():
    q, k, v, log_decay, rate, state = random_inputs(40)
    one = log_decay[..., :1]
    found = kimi_delta_rule(q, k, v, one.expand_as(log_decay), rate, state)
    torch.testing.assert_close(found, gated_delta_rule(q, k, v, one[..., 0], rate, state))


def test_a_channel_that_stays_is_read_after_another_has_vanished():
    """Two tokens write one value along two channels; the first channel alone lasts."""
    k = torch.eye(2, dtype=torch.float64)[None, :, None]
    v, rate = torch.ones(1, 2, 1, 1, dtype=torch.float64), torch.ones(1, 2, 1, dtype=torch.float64)
    log_decay = torch.tensor([0.0, -50.0], dtype=torch.float64).expand(1, 2, 1, 2)
    state = torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    nothing = torch.zeros_like(k)
    _, state = kimi_delta_rule(nothing, k, v, log_decay, rate, state)
    _, state = kimi_delta_rule(nothing, nothing, v, log_decay, 0 * rate, state)
    torch.testing.assert_close(state.flatten().tolist(), [1.0, 0.0])


def test_channels_that_vanish_at_once_give_no_inf_or_nan():
    """A decay of exp(-1000) per token: its inverse, by which products could be formed, would overflow."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 1, 3, requires_grad=True) for _ in range(3))
    log_decay = torch.full((1, 40, 1, 3), -1000.0).requires_grad_()
    o, state = kimi_delta_rule(q, k, v, log_decay, torch.ones(1, 40, 1), torch.ones(1, 1, 3, 3))
    o.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, log_decay))
    # All that is left is what the last token wrote.
    torch.testing.assert_close(state[0, 0], torch.outer(k[0, -1, 0], v[0, -1, 0]))


def test_products_decay_from_the_earlier_token_to_the_later_one():
    x, k, total = random(8, 3, seed=1), random(8, 3, seed=2), -random(8, 3).exp().cumsum(0)
    between = (total[:, None] - total[None]).exp()
    expected = (x[:, None] * k[None] * between).sum(-1).tril()
    torch.testing.assert_close(decayed_products(x, k, total), expected)


def test_the_kernels_of_fla_get_what_they_take(monkeypatch):
    """Their names of arguments and their layout, by a stand-in; the kernels themselves need a GPU."""

    def chunk_kda(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        assert scale is None
        assert output_final_state
        return rule_token_by_token(q, k, v, g, beta, initial_state)

    monkeypatch.setitem(sys.modules, "fla.ops.kda", SimpleNamespace(chunk_kda=chunk_kda))
    inputs = random_inputs(7)
    torch.testing.assert_close(kda._kimi_delta_rule_of_fla(*inputs), kimi_delta_rule(*inputs))


def test_by_its_defaults_it_is_the_published_layer():
    layer = KimiDeltaAttention(256, num_heads=2)
    assert (layer.num_kv_heads, layer.head_dim, layer.value_dim, layer.conv_size) == (2, 128, 128, 4)
    # Five projections of d x d, and four of the rank of a head.
    weights = sum(p.numel() for p in layer.parameters())
    assert weights == pytest.approx(4 * 256**2 + 4 * 256 * 128, rel=0.02)


def test_a_value_of_no_components_is_refused():
    with pytest.raises(ValueError, match="kda_value_dim: expected at least 1, found 0"):
        make(kda_value_dim=0)
