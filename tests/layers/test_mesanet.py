"""MesaNet against ridge regressions solved token by token, and what conjugate gradients do."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ovq_lab.mixers import MesaNet, mesanet
from ovq_lab.mixers.mesanet import conjugate_gradients, ridge_regression
from tests.layers.common import assert_alike_with_gradients, random

HIDDEN, HEAD, HEADS, STATES, STEPS = 12, 5, 4, 2, 30


def make(**options):
    """A float64 layer whose norm and ridge are not at their initial values, and which keeps keys for long."""
    torch.manual_seed(0)
    layer = MesaNet(HIDDEN, HEADS, STATES, HEAD, **{"conv_size": 0} | options).double()
    torch.nn.init.normal_(layer.out_norm.weight, mean=1.0, std=0.3)
    torch.nn.init.normal_(layer.ridge_bias)
    with torch.no_grad():
        layer.gate_proj.bias[:STATES] = 3.0
    return layer


def random_inputs(num_tokens):
    """What `ridge_regression` takes before the number of steps."""
    q, k = (F.normalize(random(2, num_tokens, n, HEAD, seed=n), dim=-1) for n in (HEADS, STATES))
    v, log_decay = random(2, num_tokens, STATES, HEAD), -random(2, num_tokens, STATES).exp() / 4
    root = random(2, STATES, HEAD, HEAD, seed=3)
    state = {"key_key": root @ root.transpose(-1, -2), "key_value": random(2, STATES, HEAD, HEAD)}
    ridge = 0.25 + random(HEADS, HEAD).exp()
    return q, k, v, log_decay, random(2, num_tokens, STATES).sigmoid(), ridge, state


def regression_token_by_token(q, k, v, log_decay, weight, ridge, state):
    """Each system formed, and solved exactly."""
    outputs, key_key, key_value = [], state["key_key"], state["key_value"]
    for t in range(q.shape[1]):
        decay, weighted = log_decay[:, t, :, None, None].exp(), (k[:, t] * weight[:, t, :, None])[..., None]
        key_key = decay * key_key + weighted * k[:, t, :, None]
        key_value = decay * key_value + weighted * v[:, t, :, None]
        of_heads = [x.repeat_interleave(HEADS // STATES, dim=1) for x in (key_key, key_value)]
        solved = torch.linalg.solve(of_heads[0] + ridge.diag_embed(), q[:, t, :, :, None])
        outputs.append((of_heads[1].transpose(-1, -2) @ solved)[..., 0])
    return torch.stack(outputs, 1), {"key_key": key_key, "key_value": key_value}


def layer_token_by_token(layer, x):
    """The output of a layer without convolution, and its state after the last token."""
    q, k, v = (x @ layer.qkv_proj.weight.T).split([HEADS * HEAD, STATES * HEAD, STATES * HEAD], -1)
    q, k = (F.normalize(F.silu(x).unflatten(-1, (-1, HEAD)), dim=-1) for x in (q, k))
    decay, weight = (x @ layer.gate_proj.weight.T + layer.gate_proj.bias).split(STATES, -1)
    ridge = F.softplus(layer.ridge_bias) + 0.25
    zeros = torch.zeros(len(x), STATES, HEAD, HEAD, dtype=x.dtype)
    inputs = q, k, v.unflatten(-1, (-1, HEAD)), F.logsigmoid(decay), weight.sigmoid(), ridge
    o, state = regression_token_by_token(*inputs, {"key_key": zeros, "key_value": zeros})
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.out_norm.weight
    return o.flatten(2) @ layer.o_proj.weight.T, state


@pytest.mark.parametrize("num_tokens", [1, mesanet.CHUNK, 2 * mesanet.CHUNK + 5])
def test_the_regression_in_chunks_equals_it_token_by_token(num_tokens):
    *inputs, state = random_inputs(num_tokens)
    leaves = [x.requires_grad_() for x in (*inputs, *state.values())]

    def before():
        # Sums of products of keys are symmetric, and so is what can change in them.
        return state | {"key_key": (state["key_key"] + state["key_key"].transpose(-1, -2)) / 2}

    results = ridge_regression(*inputs, before(), STEPS), regression_token_by_token(*inputs, before())
    assert_alike_with_gradients(leaves, results)


@pytest.mark.parametrize("num_tokens", [1, mesanet.CHUNK + 5])
def test_the_layer_equals_the_regression_token_by_token(num_tokens):
    layer, x = make(), random(2, num_tokens, HIDDEN).requires_grad_()
    o, _, cache = layer(x, use_cache=True)
    results = (o, cache.layers[0].state), layer_token_by_token(layer, x)
    assert_alike_with_gradients([x, *layer.parameters()], results)


def test_a_key_that_was_written_is_answered_with_its_value_whatever_else_is_near():
    """What the inverse is for: linear attention would answer with a mixture of the two values."""
    k = F.normalize(torch.tensor([[1.0, 0.2], [1.0, -0.2]], dtype=torch.float64), dim=-1)[None, :, None]
    v = torch.eye(2, dtype=torch.float64)[None, :, None]
    zeros = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    state = {"key_key": zeros, "key_value": zeros}
    ones, ridge = torch.ones(1, 2, 1, dtype=torch.float64), torch.full((1, 2), 1e-6, dtype=torch.float64)
    _, state = ridge_regression(k, k, v, 0 * ones, ones, ridge, state, STEPS)
    o, _ = ridge_regression(k, k, v, 0 * ones, 0 * ones, ridge, state, STEPS)
    torch.testing.assert_close(o, v, atol=1e-4, rtol=0)
    assert (k[0, :, 0] @ state["key_value"][0, 0]).min() > 0.9


def test_fewer_steps_are_nearer_the_query_and_more_nearer_the_solution():
    *inputs, state = random_inputs(20)
    exact = regression_token_by_token(*inputs, state)[0]
    errors = [(ridge_regression(*inputs, state, steps)[0] - exact).abs().max() for steps in (1, 2, 3, HEAD)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_watched", [False, True])
def test_steps_beyond_the_solution_change_nothing(dtype, is_watched):
    """They are not taken. Under a mode they are: the residual falls below the smallest number."""
    root = random(8, 8).to(dtype)
    matrix = root @ root.T + torch.eye(8, dtype=dtype)
    b = torch.stack([random(8, seed=1), torch.zeros(8)]).to(dtype)
    steps = []

    def times(x):
        steps.append(x)
        return x @ matrix

    with FlopCounterMode(display=False) if is_watched else nullcontext():
        found = conjugate_gradients(times, b, 300)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, b.T).T)
    assert not found[1].any()
    assert len(steps) == 300 if is_watched else 8 <= len(steps) <= 20


def test_what_overflows_is_not_taken_for_solved():
    found = conjugate_gradients(lambda x: 2 * x, torch.full((1, 8), 1e20), 30)
    assert found.isnan().all()


def test_nothing_is_kept_of_the_steps():
    def num_kept(num_steps):
        *inputs, state = random_inputs(9)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            ridge_regression(*(x.requires_grad_() for x in inputs), state, num_steps)
        return sum(sizes)

    assert num_kept(30) == num_kept(2) > 0


def test_transforms_are_refused():
    layer, x = make(), random(1, 4, HIDDEN)
    with pytest.raises(ValueError, match=r"mesanet: expected no transform of torch.func"):
        torch.func.grad(lambda x: layer(x)[0].sum())(x)


def test_the_kernels_of_fla_get_what_they_take(monkeypatch):
    """Their names of arguments and their layout, by a stand-in; the kernels themselves need a GPU."""

    def chunk_mesa_net(q, k, v, g, beta, lamb, h_kk_init, h_kv_init, output_final_state, max_CG_iteration):
        assert output_final_state
        before = {"key_key": h_kk_init, "key_value": h_kv_init}
        o, state = ridge_regression(q, k, v, g, beta, lamb, before, max_CG_iteration)
        return o, state["key_key"], state["key_value"]

    monkeypatch.setitem(sys.modules, "fla.ops.mesa_net", SimpleNamespace(chunk_mesa_net=chunk_mesa_net))
    inputs = random_inputs(7)
    found = mesanet._ridge_regression_of_fla(*inputs, STEPS)
    torch.testing.assert_close(found, ridge_regression(*inputs, STEPS))


def test_by_its_defaults_it_is_the_published_layer():
    layer = MesaNet(256, num_heads=2)
    assert (layer.num_kv_heads, layer.head_dim, layer.num_steps, layer.conv_size) == (2, 128, 30, 4)
    ridge = F.softplus(layer.ridge_bias) + mesanet.LEAST_RIDGE
    torch.testing.assert_close(ridge, torch.ones(2, 128))
    assert sum(p.numel() for p in layer.parameters()) == pytest.approx(4 * 256**2, rel=0.02)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="mesa_steps: expected at least 1, found 0"):
        make(mesa_steps=0)
