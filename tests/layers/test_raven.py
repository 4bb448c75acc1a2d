"""Raven against its recurrence written out token by token, and what its router does."""

import pytest
import torch
import torch.nn.functional as F

from ovq_lab.mixers import RavenAttention, raven
from ovq_lab.mixers.raven import routed_slots
from tests.layers.common import assert_alike_with_gradients

HIDDEN, HEAD = 12, 5


def make(**options):
    """A float64 layer whose norms are not at their initial values, and whose slots decay fast; no noise."""
    torch.manual_seed(0)
    sizes = {"raven_slots": 7, "raven_top_k": 3, "conv_size": 0, "raven_noise": False} | options
    layer = RavenAttention(HIDDEN, 4, 2, HEAD, **sizes).double()
    for norm in (layer.q_norm, layer.k_norm, layer.out_norm):
        torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    torch.nn.init.normal_(layer.rates.dt_bias)
    return layer


def random_inputs(num_tokens, rows=2):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randn(rows, num_tokens, HIDDEN, dtype=torch.float64, generator=generator)


def norm(x, weight):
    return x / (x.square().mean() + 1e-5).sqrt() * weight


def token_by_token(layer, x):
    """The output, and the keys of all slots `[B, H, M, K]` after each token."""
    outputs, all_keys = [], []
    for row in x:
        keys = [[torch.zeros(HEAD, dtype=x.dtype)] * layer.num_slots for _ in range(layer.num_heads)]
        values = [list(head) for head in keys]
        for token in row:
            q, k, v = (
                F.silu(layer.qkv_proj.weight @ token)
                .unflatten(0, (-1, HEAD))
                .split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads])
            )
            routed = layer.router_proj.weight @ token
            logits, decays = (
                routed[: -layer.num_heads].unflatten(0, (layer.num_heads, -1)),
                routed[-layer.num_heads :],
            )
            read = []
            for h in range(layer.num_heads):
                own = h // (layer.num_heads // layer.num_kv_heads)
                key, value = norm(k[own], layer.k_norm.weight), v[own]
                chosen = sorted(range(layer.num_slots), key=lambda m: -logits[h, m].item())[: layer.top_k]
                total = sum(logits[h, m].sigmoid() for m in chosen)
                step = (1 + (decays[h] + layer.rates.dt_bias[h]).exp()).log()
                for m in chosen:
                    weight = logits[h, m].sigmoid() / (total + 1e-9)
                    kept = (-layer.rates.A_log[h].exp() * step * weight).exp()
                    keys[h][m] = kept * keys[h][m] + (1 - kept) * key
                    values[h][m] = kept * values[h][m] + (1 - kept) * value
                scores = torch.stack(keys[h]) @ norm(q[h], layer.q_norm.weight)
                read.append(scores.softmax(0) @ torch.stack(values[h]))
            outputs.append(layer.o_proj.weight @ norm(F.silu(torch.cat(read)), layer.out_norm.weight))
            all_keys.append(torch.stack([torch.stack(head) for head in keys]))
    shape = len(x), x.shape[1]
    return torch.stack(outputs).unflatten(0, shape), torch.stack(all_keys).unflatten(0, shape)


@pytest.mark.parametrize("num_tokens", [1, 4, 14])
@pytest.mark.parametrize("options", [{}, {"raven_top_k": 7}, {"raven_slots": 3, "raven_top_k": 1}], ids=str)
def test_the_layer_equals_the_recurrence_token_by_token(options, num_tokens, monkeypatch):
    monkeypatch.setattr(raven, "CHUNK", 4)
    layer, x = make(**options), random_inputs(num_tokens).requires_grad_()
    o, _, cache = layer(x, use_cache=True)
    expected, keys = token_by_token(layer, x)
    torch.testing.assert_close(cache.layers[0].state["slot_keys"], keys[:, -1])
    assert_alike_with_gradients([x, *layer.parameters()], [o, expected])


def test_a_token_changes_the_selected_slots_alone():
    layer, x = make(), random_inputs(30, rows=1)
    with torch.no_grad():
        before = layer(x[:, :-1], use_cache=True)[2].layers[0].state
        after = layer(x, use_cache=True)[2].layers[0].state
    for name, slots in after.items():
        is_changed = (slots - before[name]).abs().amax(-1) > 1e-12
        assert is_changed.sum(-1).tolist() == [[3] * 4], name


def test_slots_that_nearly_vanish_give_no_inf_or_nan():
    """A decay of exp(-1000) per token: a product of decays would underflow, and its inverse overflow."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 40, 2, 3, requires_grad=True) for _ in range(3))
    slots = torch.arange(4).expand(1, 40, 2, 4)
    log_decay = torch.full((1, 40, 2, 4), -1000.0).requires_grad_()
    zeros = torch.zeros(1, 2, 4, 3)
    o, keys, _ = routed_slots(q, k, v, slots, log_decay, keys=zeros, values=zeros)
    o.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, log_decay))
    # Each token replaces what was there.
    torch.testing.assert_close(o, v)
    torch.testing.assert_close(keys, k[:, -1, :, None].expand(1, 2, 4, 3))


def test_noise_is_added_in_training_alone_and_comes_from_the_seed():
    layer, x = make(raven_noise=True), random_inputs(9)
    with torch.no_grad():
        quiet = layer.eval()(x)[0]
        assert torch.equal(layer(x)[0], quiet)
        noisy = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            noisy.append(layer.train()(x)[0])
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert not torch.equal(noisy[0], quiet)


def test_a_new_layer_is_as_its_authors_define_it():
    """Rates uniform from 0 to 16, not on a logarithmic scale; steps from 0.001 to 0.1; noise in training."""
    torch.manual_seed(0)
    layer = RavenAttention(8, 4000, head_dim=1, raven_slots=1)
    assert layer.raven_noise
    rates = layer.rates.A_log.exp()
    shares = torch.histc(rates, bins=4, min=0, max=16) / len(rates)
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.03, rtol=0)
    steps = layer.rates(torch.zeros(4000))[0]
    assert 0.00099 < steps.min() < 0.0011
    assert 0.09 < steps.max() < 0.1


def test_logits_that_tie_select_the_first_slots():
    layer = make()
    torch.nn.init.zeros_(layer.router_proj.weight)
    with torch.no_grad():
        state = layer(random_inputs(5), use_cache=True)[2].layers[0].state
    assert state["slot_keys"].any(-1)[0, 0].tolist() == [True] * 3 + [False] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raven_top_k": 8}, "expected 1 <= raven_top_k <= raven_slots, found raven_top_k=8, raven_slots=7"),
        ({"raven_top_k": 0}, "found raven_top_k=0"),
        ({"raven_slots": 0, "raven_top_k": None}, "raven_top_k=1, raven_slots=0"),
        ({"raven_head_dim": 0}, "raven_head_dim: expected at least 1, found 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
