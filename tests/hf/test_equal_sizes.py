"""Sizes at which mixers are compared: the parameters, or the bytes, of an OVQ layer."""

import pytest
import torch

from ovq.hf import OVQConfig
from ovq.hf.block import build_mixer
from ovq.hf.equal_sizes import equal_sizes
from ovq.layers import OVQAttention, SinkAttention
from ovq.layers.memory import num_bytes
from ovq.layers.sinks import window_of_equal_bytes
from ovq_lab.mixers import MIXERS
from ovq_lab.train.loop import model_config
from ovq_lab.train.recipes import get_recipe


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 64, "conv_size": 3},
        {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "conv_size": 4},
        {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "conv_size": 0},
    ],
)
def test_every_mixer_has_the_parameters_of_ovq_within_five_percent(name, sizes):
    sizes = sizes | {"num_hidden_layers": 2, "mixer_types": [name, "ovq"], "num_slots": 64, "chunk_size": 64}
    config = OVQConfig(**sizes | equal_sizes(OVQConfig(**sizes)))
    ours, theirs = (sum(p.numel() for p in build_mixer(config, i).parameters()) for i in (0, 1))
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_slots", "chunk_size"), [(64, 64), (1024, 128), (7, 4), (1, 1)])
def test_the_window_has_just_the_bytes_of_the_dictionary(num_slots, chunk_size, dtype):
    sizes = {"num_kv_heads": 2, "head_dim": 16}
    window = window_of_equal_bytes(num_slots, chunk_size, **sizes, num_sinks=4, dtype=dtype)
    # The other schedules come within a slot of the bound, and never reach it.
    ovq = OVQAttention(32, 4, num_slots=num_slots, chunk_size=chunk_size, growth="immediate", **sizes)

    def memory_bytes(layer):
        return num_bytes(layer.memory_spec(4096, dtype))

    def bytes_of(sink_window):
        layer = SinkAttention(32, 4, **sizes, num_sinks=4, sink_window=sink_window)
        return memory_bytes(layer)

    full = memory_bytes(ovq)
    assert bytes_of(window) >= full
    assert window == 2 or bytes_of(window - 1) < full


def test_a_run_has_equal_sizes_but_for_those_it_names():
    run = get_recipe("recall-mamba2").override(["model.mixer_types=sink_attention,mamba2"])
    config = model_config(run)
    sizes = equal_sizes(config)
    assert set(sizes) == {"sink_window", "mamba_head_dim", "mamba_state_size"}
    assert {name: getattr(config, name) for name in sizes} == sizes
    changed = model_config(run.override(["model.mamba_state_size=7", "model.num_slots=256"]))
    assert changed.mamba_state_size == 7
    assert changed.sink_window > config.sink_window
    assert changed.mamba_head_dim == config.mamba_head_dim
