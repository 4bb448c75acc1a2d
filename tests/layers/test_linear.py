"""Linear attention in chunks against the plain quadratic form, gradients included."""

import pytest
import torch

from ovq_lab.mixers import LinearAttention
from ovq_lab.mixers.linear import CHUNK, linear_attention
from tests.layers.common import assert_alike_with_gradients


def quadratic(q, k, v):
    """All pairs of tokens, a query head at a time."""
    outputs = []
    for head in range(q.shape[2]):
        kv_head = head // (q.shape[2] // k.shape[2])
        weights = torch.einsum("btk,bsk->bts", q[:, :, head], k[:, :, kv_head]).tril()
        weights = weights / weights.sum(-1, keepdim=True)
        outputs.append(weights @ v[:, :, kv_head])
    return torch.stack(outputs, 2)


def random_inputs(num_tokens, num_kv_heads):
    generator = torch.Generator().manual_seed(num_tokens)

    def random(*shape):
        return torch.rand(2, num_tokens, *shape, dtype=torch.float64, generator=generator).requires_grad_()

    return random(4, 5), random(num_kv_heads, 5), random(num_kv_heads, 3)


@pytest.mark.parametrize("num_tokens", [1, 7, CHUNK, CHUNK + 1, 3 * CHUNK - 5])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_chunks_equal_the_quadratic_form_and_its_gradients(num_tokens, num_kv_heads):
    inputs = random_inputs(num_tokens, num_kv_heads)
    empty = torch.zeros(2, num_kv_heads, 5, 4, dtype=torch.float64)
    found, kv_sum = linear_attention(*inputs, empty)
    expected = quadratic(*inputs)
    _, k, v = inputs
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    torch.testing.assert_close(kv_sum, torch.einsum("bthk,bthv->bhkv", k, v))
    assert_alike_with_gradients(inputs, (found, expected))


def test_features_are_a_softmax_with_the_temperature_of_the_head():
    torch.manual_seed(0)
    layer = LinearAttention(16, 2, conv_size=0).double()
    with torch.no_grad():
        layer.qk_norm.beta.copy_(torch.tensor([0.5, 3.0]))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    q, k, v = layer.qkv_proj(x).unflatten(-1, (6, 8)).chunk(3, dim=2)
    scale = torch.tensor([0.5, 3.0], dtype=torch.float64)[:, None] * 8**0.5
    q, k = (torch.softmax(scale * torch.nn.functional.normalize(t, dim=-1), -1) for t in (q, k))
    torch.testing.assert_close(layer(x)[0], layer.o_proj(quadratic(q, k, v).flatten(2)))
