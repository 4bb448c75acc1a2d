"""The OVQ layer: what it has in common with full attention, and its elastic dictionary."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch

from ovq.layers import FullAttention, OVQAttention, mixer_class
from ovq.layers.ovq import LEARNING_OPTIONS
from ovq.ops import ovq_attention
from ovq.ops.schedule import GROWTHS, slots_by_chunk
from ovq_lab.mixers import MIXERS


def twins(**options):
    """An OVQ layer that remembers every token, and full attention with the same weights."""
    torch.manual_seed(0)
    ovq = OVQAttention(
        24, 4, 2, num_slots=64, chunk_size=5, conv_size=3, growth="immediate", **options
    ).double()
    full = FullAttention(24, 4, 2, conv_size=3).double()
    full.load_state_dict(ovq.state_dict())
    return ovq, full


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_with_a_slot_for_every_token_it_is_full_attention(backend):
    ovq, full = twins(backend=backend)
    with torch.no_grad():
        for layer in (ovq, full):
            layer.qk_norm.beta.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    x = torch.randn(2, 33, 24, dtype=torch.float64)
    gradients = []
    for layer in (ovq, full):
        layer(x)[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in layer.named_parameters()})
    torch.testing.assert_close(ovq(x)[0], full(x)[0])
    torch.testing.assert_close(*gradients)


def test_with_fewer_slots_it_is_not():
    ovq, full = twins()
    ovq.set_num_slots(4)
    x = torch.randn(2, 33, 24, dtype=torch.float64)
    assert not torch.allclose(ovq(x)[0], full(x)[0], atol=1e-3)


def test_the_dictionary_is_elastic_in_mid_stream():
    torch.manual_seed(0)
    layer = OVQAttention(16, 2, num_slots=4, chunk_size=4)
    x = torch.randn(1, 64, 16)
    with torch.no_grad():
        _, _, cache = layer(x[:, :32], use_cache=True)
        small = cache.layers[0].state
        layer.set_num_slots(64)
        layer(x[:, 32:], past_key_values=cache)
        grown = cache.layers[0].state
        layer.set_num_slots(2)
        layer(x[:, :1], past_key_values=cache)
        shrunk = cache.layers[0].state
    assert (small.num_slots, grown.num_slots, shrunk.num_slots) == (4, 64, 2)
    assert int(small.num_open) < 4 < int(grown.num_open)
    assert int(shrunk.num_open) == 2
    assert int(shrunk.count.sum()) == 2 * 64  # two heads, and no token forgotten


@pytest.mark.parametrize("merge", ["existing", "nearest"])
def test_a_layer_shrinks_a_state_with_its_weight_of_values(merge):
    torch.manual_seed(1)
    layer = OVQAttention(16, 2, num_slots=32, chunk_size=4, merge=merge, value_weight=0.7)
    with torch.no_grad():
        _, _, cache = layer(torch.randn(1, 200, 16), use_cache=True)
        state = cache.layers[0].state
        layer.set_num_slots(4)
        layer(torch.randn(1, 1, 16), past_key_values=cache)
    shrunk = state.resize(4, value_weight=0.7)
    assert not torch.equal(shrunk.count, state.resize(4).count)
    torch.testing.assert_close(cache.layers[0].state.key_sum, shrunk.key_sum, rtol=0, atol=0)


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize(("num_slots", "chunk_size"), [(1, 1), (7, 1), (5, 8), (64, 5), (40, 40)])
def test_slots_in_use_are_those_that_the_chunks_open(growth, num_slots, chunk_size):
    sizes = {"num_slots": num_slots, "chunk_size": chunk_size, "growth": growth}
    mixer = OVQAttention(8, 1, **sizes)
    opened = slots_by_chunk(0, 0, 60, **sizes)
    assert [mixer.num_open(n) for n in range(60 * chunk_size)] == [
        opened[n // chunk_size] for n in range(60 * chunk_size)
    ]
    # Without going through the chunks.
    assert mixer.num_open(10**18) in (num_slots - 1, num_slots) or num_slots == 1


def test_options_of_learning_are_those_of_the_op():
    op, layer = (inspect.signature(callable).parameters for callable in (ovq_attention, OVQAttention))
    assert {name: layer[name].default for name in LEARNING_OPTIONS} == {
        name: op[name].default for name in LEARNING_OPTIONS
    }
    # Beside these a caller tells the op sizes, tensors and how to run, alone.
    assert set(op) - set(LEARNING_OPTIONS) == {
        *("q", "k", "v", "num_slots", "chunk_size", "scale", "initial_state", "output_final_state"),
        *("attention_mask", "cu_seqlens", "generator", "backend"),
        *("token_weights", "log_forget"),  # A layer has modules for them.
        "earlier_names",
    }


def test_a_generator_decides_the_random_slots():
    torch.manual_seed(0)
    layer = OVQAttention(16, 2, num_slots=4, chunk_size=8, init="random")
    x = torch.randn(1, 64, 16)
    first, again, other = (layer(x, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slots": 0}, "num_slots: expected an integer of at least 1, found 0"),
        ({"num_slots": 2.5}, r"num_slots: expected an integer of at least 1, found 2\.5"),
        ({"chunk_size": 0}, "chunk_size: expected an integer of at least 1, found 0"),
        ({"chunk_size": "8"}, "chunk_size: expected an integer of at least 1, found '8'"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OVQAttention(16, 2, **arguments)


@pytest.mark.parametrize("option", ["growth", "init", "merge", "backend"])
def test_unknown_options_are_refused(option):
    layer = OVQAttention(16, 2, **{option: "best"})
    with pytest.raises(ValueError, match=rf"{option}: expected one of .* found 'best'"):
        layer(torch.randn(1, 3, 16))


def test_the_registry_names_what_there_is():
    assert mixer_class("ovq") is OVQAttention
    with pytest.raises(ValueError, match=r"full_attention.*ovq.*sliding_attention.*found 'mamba3'"):
        mixer_class("mamba3")
    softmax = {"full_attention", "fox", "sliding_attention", "sink_attention"}
    recurrent = {"linear_attention", "gated_deltanet", "kda", "mesanet", "mamba2"}
    assert set(MIXERS) == {"ovq", "vq", "kvm", "raven"} | recurrent | softmax


@torch.no_grad()
def test_layers_that_share_a_cache_need_an_index():
    """Two that are layer 0 would each read the tokens of the other, which nothing else shows."""
    first, second = (OVQAttention(16, 2, num_slots=8, chunk_size=4) for _ in range(2))
    x = torch.randn(1, 6, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        *_, cache = first(x, use_cache=True)
        first(x, past_key_values=cache)
        # What is copied or read from a file belongs to the layer that goes on.
        for copied in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
            second(x, past_key_values=copied)
            first(x, past_key_values=copied)
        first_of_two, second_of_two = (
            OVQAttention(16, 2, num_slots=8, chunk_size=4, layer_idx=i) for i in range(2)
        )
        *_, shared = first_of_two(x, use_cache=True)
        for layer in (second_of_two, first_of_two, second_of_two):
            layer(x, past_key_values=shared)
        # So does a cache that is handed over.
        second(x, past_key_values=cache)
        second(x, past_key_values=cache)
    with pytest.warns(UserWarning, match="several layers without layer_idx read tokens in turns"):
        first(x, past_key_values=cache)
    first.layer_idx = second.layer_idx = 1
    *_, cache = first(x, use_cache=True)
    second(x, past_key_values=cache)
    with pytest.warns(UserWarning, match="with the same layer_idx read tokens in turns into its layer 1"):
        first(x, past_key_values=cache)
