"""Layers whose slots are in bfloat16 or int8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ovq.layers import OVQAttention
from ovq.layers.cache import MixerCache
from ovq.layers.memory import SlotMemory, num_bytes

SIZES = {"hidden_size": 32, "num_heads": 2, "num_slots": 12, "chunk_size": 8, "conv_size": 3}


def layer(**options: object) -> OVQAttention:
    torch.manual_seed(0)
    return OVQAttention(**SIZES, layer_idx=0, **options).eval()


def read(
    mixer: OVQAttention, x: Tensor, *ends: int, cache: MixerCache | None = None
) -> tuple[Tensor, MixerCache]:
    outputs = []
    for start, end in zip((0, *ends), (*ends, x.shape[1]), strict=True):
        o, _, cache = mixer(x[:, start:end], past_key_values=cache, use_cache=True)
        outputs.append(o)
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"merge": "nearest", "merge_gate": True},
        {"forget_gate": True},
        {"merge": "nearest", "merge_gate": True, "forget_gate": True},
        {"merge": "nearest", "use_rope": True},
    ],
    ids=["paper", "gate", "forget", "both", "rope"],
)
@torch.no_grad()
def test_outputs_are_those_without_a_cache_however_a_text_is_split(state_dtype, options):
    mixer, x = layer(state_dtype=state_dtype, **options), torch.randn(2, 50, 32)
    whole, _, _ = mixer(x)
    exact, _, _ = layer(**options)(x)
    assert not torch.allclose(whole, exact, atol=1e-5)
    for ends in ((30,), range(25, 50)):
        o, cache = read(mixer, x, *ends)
        torch.testing.assert_close(o, whole, atol=2e-6, rtol=0)
        state = cache.layers[0].state
        assert state.state_dtype == state_dtype
        spec = mixer.state_spec(50, torch.float32)
        assert cache.nbytes == 2 * num_bytes(spec)
    # Rows of packed and padded calls, too.
    mask = torch.arange(50) < torch.tensor([[50], [21]])
    padded, _, _ = mixer(x, attention_mask=mask)
    torch.testing.assert_close(padded[1, :21], whole[1, :21], atol=2e-6, rtol=0)
    packed, _, _ = mixer(torch.cat([x[0], x[1, :21]])[None], cu_seqlens=torch.tensor([0, 50, 71]))
    torch.testing.assert_close(packed[0, 50:], whole[1, :21], atol=2e-6, rtol=0)


@pytest.mark.parametrize("forget_gate", [False, True])
@torch.no_grad()
def test_a_cached_state_is_converted_on_next_use(forget_gate):
    mixer, x = layer(forget_gate=forget_gate), torch.randn(1, 40, 32)
    _, cache = read(mixer, x[:, :30])
    before = cache.layers[0].state
    mixer.set_state_dtype("int8")
    converted = MixerCache()
    converted.layers = [cache.layers[0].branch()]
    converted.layers[0].state = before.to_state_dtype("int8")
    expected, _ = read(mixer, x[:, 30:], cache=converted)
    o, cache = read(mixer, x[:, 30:], cache=cache)
    assert cache.layers[0].state.state_dtype == "int8"
    assert torch.equal(o, expected)
    # And back.
    mixer.set_state_dtype("float32")
    _, cache = read(mixer, x[:, :1], cache=cache)
    assert cache.layers[0].state.key_sum.dtype == torch.float32


@pytest.mark.parametrize("forget_gate", [False, True])
@torch.no_grad()
def test_rotated_sums_of_rows_that_join_are_rounded_once(forget_gate):
    memory = SlotMemory(num_slots=12, chunk_size=8, rope_theta=100.0)
    _, cache = read(layer(state_dtype="int8", forget_gate=forget_gate), torch.randn(1, 20, 32))
    state = cache.layers[0].state
    wide = state.to_state_dtype("float32")
    joined, expected = (memory.concatenate([each, each], [0, 5]) for each in (state, wide))
    assert torch.equal(joined.key_sum, expected.to_state_dtype("int8").key_sum)
    assert torch.equal(joined.key_step, expected.to_state_dtype("int8").key_step)
    assert not torch.equal(joined.keys[0], joined.keys[1])


def test_training_takes_float32():
    mixer = layer(state_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"gradients: expected sums in float32 .*found bfloat16"):
        mixer(torch.randn(1, 20, 32))
    with pytest.raises(ValueError, match=r"state_dtype: expected one of .*found 'float16'"):
        mixer.set_state_dtype("float16")
    assert mixer.state_dtype == "bfloat16"
