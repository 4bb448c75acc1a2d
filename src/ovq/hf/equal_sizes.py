"""Sizes at which other mixers have as many parameters as an OVQ layer, or a state of as many bytes.

Experiments compare mixers at these sizes. Configs that were saved before the sizes were fields imply them.
"""

from __future__ import annotations

from typing import Any

from ovq.layers.registry import mixer_class


def equal_sizes(config: Any) -> dict[str, int]:
    """Values of fields at which the mixers of an `OVQConfig` are as large as an `"ovq"` layer of it.

    Each mixer has its own rule (`Mixer.equal_sizes`). `"gated_deltanet"`, `"kda"`, `"mamba2"` and `"raven"`
    get as many parameters, within a few percent; the sizes of their states follow from that, and for
    `"raven"` from `raven_slots` too. `"mesanet"` has as many as it is. `"sink_attention"` gets a state of as
    many bytes, and `"kvm"` a window of as many tokens as a chunk of OVQ, beside as many slots.

    Example:
        >>> from ovq.hf import OVQConfig
        >>> sizes = {"num_attention_heads": 2, "head_dim": 64, "num_slots": 64, "chunk_size": 64}
        >>> mixers = ["gated_deltanet", "mamba2", "ovq"]
        >>> equal_sizes(OVQConfig(**sizes, num_hidden_layers=3, mixer_types=mixers))
        {'delta_head_dim': 32, 'delta_value_dim': 64, 'mamba_head_dim': 64, 'mamba_state_size': 63}
    """
    mixers = map(mixer_class, dict.fromkeys(config.mixer_types))
    return {name: size for mixer in mixers for name, size in mixer.equal_sizes(config).items()}
