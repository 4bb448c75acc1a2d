"""Attention with sinks against masked attention over everything."""

import pytest
import torch
import torch.nn.functional as F

from ovq.layers import SinkAttention
from ovq.layers.sinks import sink_read
from tests.layers.common import assert_alike_with_gradients
from tests.written import Written


def dense(q, k, v, num_sinks, window):
    """PyTorch's attention with an explicit mask of all pairs."""
    query, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    is_seen = (key <= query) & ((key > query - window) | (key < num_sinks))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen, scale=1.0, enable_gqa=True)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 23])
@pytest.mark.parametrize(("num_sinks", "window"), [(1, 2), (3, 5), (6, 4), (2, 40)])
def test_reading_equals_masked_attention_and_its_gradients(num_tokens, num_sinks, window):
    generator = torch.Generator().manual_seed(num_tokens)
    q, k, v = (
        torch.randn(2, heads, num_tokens, 4, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    )
    fill = (0, 0, 0, max(0, num_sinks - num_tokens))
    sinks = [F.pad(x[:, :, :num_sinks], fill) for x in (k, v)]
    found = sink_read(q, k, v, *sinks, torch.zeros(2, dtype=torch.long), window=window)
    expected = dense(q, k, v, num_sinks, window)
    assert_alike_with_gradients((q, k, v), (found, expected))


def test_a_token_sees_the_first_tokens_and_its_window():
    torch.manual_seed(0)
    layer = SinkAttention(8, 1, num_sinks=2, sink_window=3, conv_size=0)
    x = torch.randn(1, 12, 8, requires_grad=True)
    layer(x)[0][0, 8].sum().backward()
    assert x.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [0, 1, 6, 7, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_sinks": 0}, "num_sinks: expected an integer of at least 1, found 0"),
        ({"sink_window": 1}, "sink_window: expected an integer of at least 2, found 1"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SinkAttention(8, 1, **arguments)


@torch.no_grad()
def test_rows_shorter_than_the_window_do_not_pay_for_it():
    layer, ends = SinkAttention(8, 2, sink_window=1000), torch.arange(0, 501, 5)
    with Written() as mode:
        layer(torch.randn(1, 500, 8), cu_seqlens=ends)
    assert mode.numel < 100 * 1000 * 8
