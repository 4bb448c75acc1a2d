"""Softmax attention against a dense reference, and the cost of the sliding window by counting."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ovq.layers import FullAttention, SlidingWindowAttention
from ovq.layers.softmax import causal_read, windowed_read
from tests.written import Written


def dense(q, k, v, segments, window):
    """Softmax attention with the whole matrix and an explicit mask, query by query."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    num_past = k.shape[2] - q.shape[2]
    outputs = []
    for t in range(q.shape[2]):
        seen = torch.zeros(q.shape[0], k.shape[2], dtype=torch.bool)
        seen[:, max(0, num_past + t - window + 1) : num_past + t + 1] = True
        if segments is not None:
            seen &= segments == segments[:, num_past + t, None]
        scores = torch.einsum("bhk,bhsk->bhs", q[:, :, t], k).masked_fill(~seen[:, None], -torch.inf)
        outputs.append(torch.einsum("bhs,bhsv->bhv", scores.softmax(-1), v))
    return torch.stack(outputs, 2)


@settings(max_examples=60, deadline=None)
@given(
    num_queries=st.integers(1, 25),
    num_past=st.integers(0, 12),
    window=st.integers(2, 9),
    kv_heads=st.sampled_from([1, 2]),
    padding=st.sampled_from([None, "left", "right", "packed"]),
    seed=st.integers(0, 99),
)
def test_windowed_and_causal_reads_equal_the_dense_reference(
    num_queries, num_past, window, kv_heads, padding, seed
):
    generator = torch.Generator().manual_seed(seed)
    num_keys = num_past + num_queries

    def random(heads, length, dim):
        return torch.randn(2, heads, length, dim, dtype=torch.float64, generator=generator)

    q, k, v = random(2, num_queries, 4), random(kv_heads, num_keys, 4), random(kv_heads, num_keys, 3)
    segments = None
    if padding == "packed":
        segments = torch.randint(0, 2, (1, num_keys), generator=generator).cumsum(1).expand(2, -1)
    elif padding is not None:
        column = torch.arange(num_keys)
        column = column.flip(0) if padding == "left" else column
        lengths = torch.randint(0, num_keys + 1, (2, 1), generator=generator)
        segments = (column < lengths).long() - 1
    o = windowed_read(q, k, v, segments, window=window)
    torch.testing.assert_close(o, dense(q, k, v, segments, window))
    o = causal_read(q, k, v, segments)
    torch.testing.assert_close(o, dense(q, k, v, segments, num_keys))


def flops(layer, num_tokens, num_padding=0):
    """Multiply-adds of all matrix products, those within attention included."""
    # In float64, because kernels are black boxes to the counter; the plain read multiplies in the open.
    x = torch.randn(1, num_tokens, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, num_tokens)
    mask[:, :num_padding] = 0
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        layer.double()(x, mask)[0].sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_padding", [0, 5])
def test_the_sliding_window_costs_linear_time(num_padding):
    layer = SlidingWindowAttention(16, 2, sliding_window=8)
    assert flops(layer, 1024, num_padding) / flops(layer, 512, num_padding) == pytest.approx(2, rel=0.02)
    # Negative control: the same count sees the square in full attention.
    assert flops(FullAttention(16, 2), 1024) / flops(FullAttention(16, 2), 512) > 3


def test_the_sliding_window_needs_linear_memory_with_padding_packing_and_cache():
    def largest(layer, num_tokens, **kwargs):
        x = torch.randn(1, num_tokens, 16)
        with Written() as written, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            layer(x, **kwargs)
        return written.largest

    layer = SlidingWindowAttention(16, 2, sliding_window=8)
    # So many that what the kernels need as scratch, whatever the number of tokens, is less than that.
    for num_tokens in (4096, 8192):
        mask = torch.ones(1, num_tokens)
        mask[:, :5] = 0
        _, _, cache = layer(torch.randn(1, 20, 16), use_cache=True)
        # The widest are the 48 channels of q, k and v; the scores, 2 heads x 16 keys a token, are below that.
        bound = (num_tokens + 8) * 48
        assert largest(layer, num_tokens, attention_mask=mask) <= bound
        assert largest(layer, num_tokens, cu_seqlens=torch.tensor([0, 100, num_tokens])) <= bound
        assert largest(layer, num_tokens, past_key_values=cache) <= bound
    assert largest(FullAttention(16, 2), 512) >= 512 * 512


def test_the_window_counts_the_token_itself():
    torch.manual_seed(0)
    layer = SlidingWindowAttention(8, 1, sliding_window=3, conv_size=0)
    x = torch.randn(1, 10, 8, requires_grad=True)
    layer(x)[0][0, 6].sum().backward()
    assert x.grad[0].abs().sum(-1).nonzero().flatten().tolist() == [4, 5, 6]


def test_full_attention_is_plain_causal_attention_of_unit_vectors():
    torch.manual_seed(0)
    layer = FullAttention(16, 2, conv_size=0)
    x = torch.randn(2, 9, 16)
    q, k, v = layer.qkv_proj(x).unflatten(-1, (6, 8)).transpose(1, 2).chunk(3, dim=1)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=8**0.5)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(o.transpose(1, 2).flatten(2)))


def test_a_window_of_one_token_is_refused():
    with pytest.raises(ValueError, match="sliding_window: expected an integer of at least 2, found 1"):
        SlidingWindowAttention(8, 1, sliding_window=1)


@pytest.mark.parametrize("layer_class", [FullAttention, SlidingWindowAttention])
def test_caches_of_other_sizes_are_refused(layer_class):
    """Without a convolution, which would find it out before."""
    layer, other = (layer_class(16, 2, num_kv_heads=n, conv_size=0) for n in (2, 1))
    _, _, cache = layer(torch.randn(2, 5, 16), use_cache=True)
    for num_tokens in (1, 3):
        with pytest.raises(ValueError, match=r"keys and values of \[2, 1, 8\] .* found \[2, 2, 8\]"):
            other(torch.randn(2, num_tokens, 16), past_key_values=cache)
