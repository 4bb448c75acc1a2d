"""Sizes at which mixers are compared: the parameters, or the bytes, of an OVQ layer."""

import pytest
import torch

from ovq.hf import OVQConfig
from ovq.hf.block import build_mixer
from ovq.hf.equal_sizes import equal_sizes
from ovq.layers.memory import num_bytes
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
        {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 52, "output_gate": True},
    ],
)
def test_every_mixer_has_the_parameters_of_ovq_within_five_percent(name, sizes):
    sizes = sizes | {"num_hidden_layers": 2, "mixer_types": [name, "ovq"], "num_slots": 64, "chunk_size": 64}
    config = OVQConfig(**sizes | equal_sizes(OVQConfig(**sizes)))
    ours, theirs = (sum(p.numel() for p in build_mixer(config, i).parameters()) for i in (0, 1))
    if name in ("kvm", "mesanet") and "output_gate" in sizes:
        # No size of theirs can make up for the gate.
        theirs -= sum(p.numel() for p in build_mixer(config, 1).output_gate.parameters())
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize(("num_slots", "chunk_size"), [(64, 64), (1024, 128), (7, 4), (1, 1)])
@pytest.mark.parametrize("gates", [{}, {"merge_gate": True}, {"forget_gate": True}], ids=str)
def test_the_window_has_just_the_bytes_of_the_dictionary(num_slots, chunk_size, gates):
    # The other schedules come within a slot of the bound, and never reach it.
    sizes = {"num_slots": num_slots, "chunk_size": chunk_size, "growth": "immediate", **gates}
    sizes |= {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = OVQConfig(**sizes, num_hidden_layers=2, mixer_types=["sink_attention", "ovq"])

    def memory_bytes(layer):
        return num_bytes(build_mixer(config, layer).memory_spec(4096, torch.float32))

    window, full = equal_sizes(config)["sink_window"], memory_bytes(1)
    config.sink_window = window
    assert memory_bytes(0) >= full
    if window > 2:
        config.sink_window = window - 1
        assert memory_bytes(0) < full


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
