"""Tests of log-n scaling: where it scales what, by which places of rows, and who refuses it."""

import math

import pytest
import torch

from ovq.layers import FullAttention, OVQAttention, SinkAttention, SlidingWindowAttention
from ovq.layers.layout import SequenceLayout
from ovq.layers.logn import logn_factor, logn_factors
from ovq_lab.mixers import LinearAttention, VQAttention

SIZES = {"hidden_size": 16, "num_heads": 2}
OVQ = {"num_slots": 8, "chunk_size": 4, "conv_size": 0}
LENGTH = 6


def test_factors_are_ratios_of_logarithms_beyond_the_length():
    layout = SequenceLayout.of(None, batch_size=1, num_past=0, num_new=36)
    factors = logn_factors(layout, LENGTH, like=torch.empty(0, dtype=torch.float64))
    assert factors[0, :LENGTH].eq(1).all()
    assert factors[0].tolist() == pytest.approx([logn_factor(place, LENGTH) for place in range(1, 37)])
    assert factors[0, 35].item() == pytest.approx(2)
    layout = SequenceLayout.of(None, batch_size=1, num_past=2, num_new=LENGTH - 2)
    assert logn_factors(layout, LENGTH, like=torch.empty(0)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_are_exactly_one_up_to_any_length(dtype):
    like = torch.empty(0, dtype=dtype)
    for length in range(2, 500):
        layout = SequenceLayout.of(None, batch_size=1, num_past=0, num_new=length + 9)
        factors = logn_factors(layout, length, like=like)
        assert factors[0, :length].eq(1).all(), length
        assert factors[0, length:].gt(1).all(), length


def test_queries_beyond_the_length_read_with_a_higher_temperature():
    torch.manual_seed(0)
    layer = OVQAttention(**SIZES, **OVQ, logn_length=LENGTH)
    with layer.recording() as calls:
        layer(torch.randn(1, 10, 16))
    lengths = calls[0].q.norm(dim=-1)
    expected = torch.tensor([max(1.0, math.log(t) / math.log(LENGTH)) for t in range(1, 11)])
    assert torch.allclose(lengths, expected[None, :, None].expand_as(lengths))


@pytest.mark.parametrize("make", [FullAttention, OVQAttention])
@torch.no_grad()
def test_padding_packing_and_caches_count_places_in_the_row(make):
    torch.manual_seed(0)
    layer = make(**SIZES, **(OVQ if make is OVQAttention else {"conv_size": 0}), logn_length=LENGTH)
    x = torch.randn(1, 20, 16)
    whole = layer(x)[0]
    layer.set_logn_length(None)
    assert torch.equal(layer(x)[0][:, :LENGTH], whole[:, :LENGTH])
    assert not torch.allclose(layer(x)[0], whole, atol=1e-4)
    layer.set_logn_length(LENGTH)
    first, _, cache = layer(x[:, :9], use_cache=True)
    rest = [first, *(layer(part, past_key_values=cache)[0] for part in x[:, 9:].split([1, 7, 3], dim=1))]
    torch.testing.assert_close(torch.cat(rest, 1), whole)
    mask = torch.tensor([[0] * 5 + [1] * 20, [1] * 25])
    rows = torch.cat([torch.cat([x[:, :5], x], 1), torch.randn(1, 25, 16)])
    torch.testing.assert_close(layer(rows, attention_mask=mask)[0][:1, 5:], whole)
    first, _, cache = layer(rows[:, :12], attention_mask=mask[:, :12], use_cache=True)
    rest = layer(rows[:, 12:], attention_mask=mask, past_key_values=cache)[0]
    torch.testing.assert_close(torch.cat([first, rest], 1)[:1, 5:], whole)
    packed = layer(torch.cat([rows[1:], x], 1), cu_seqlens=torch.tensor([0, 25, 45]))[0]
    torch.testing.assert_close(packed[:, 25:], whole)


def test_a_state_does_not_depend_on_it():
    torch.manual_seed(0)
    layer, x = OVQAttention(**SIZES, **OVQ), torch.randn(1, 21, 16)
    plain = layer(x, use_cache=True)[2].layers[0].state
    layer.set_logn_length(LENGTH)
    scaled = layer(x, use_cache=True)[2].layers[0].state
    assert all(torch.equal(getattr(plain, name), getattr(scaled, name)) for name in ("key_sum", "value_sum"))


@pytest.mark.parametrize("make", [SlidingWindowAttention, SinkAttention, LinearAttention, VQAttention])
def test_other_mixers_refuse_it(make):
    with pytest.raises(ValueError, match=f"expected logn_length=None, found 6: {make.__name__}"):
        make(**SIZES, logn_length=LENGTH)


@pytest.mark.parametrize("length", [1, 0, 2.5, True, "64"])
def test_other_lengths_are_refused(length):
    with pytest.raises(ValueError, match="expected logn_length to be None or an integer of at least 2"):
        FullAttention(**SIZES, logn_length=length)
