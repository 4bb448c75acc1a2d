"""Sizes at which other mixers have as many parameters as an OVQ layer, or a state of as many bytes.

Experiments compare mixers at these sizes. Configs saved before the sizes were fields imply them.
"""

from __future__ import annotations

from typing import Any

from ovq.layers.registry import mixer_class


def equal_sizes(config: Any) -> dict[str, int]:
    """Size fields that make the mixers of an `OVQConfig` as large as its `"ovq"` layer.

    Each mixer has its own rule (`Mixer.equal_sizes`). `"gated_deltanet"`, `"kda"`, `"mamba2"` and `"raven"`
    get as many parameters, within a few percent; their state sizes follow from that, for `"raven"` also from
    `raven_slots`. `"mesanet"` has as many parameters by default, as a layer without an output gate.
    `"sink_attention"` gets a state of as many bytes, and `"kvm"` as many slots and a window of as many tokens
    as a chunk of OVQ.
    """
    mixers = map(mixer_class, dict.fromkeys(config.mixer_types))
    return {name: size for mixer in mixers for name, size in mixer.equal_sizes(config).items()}
