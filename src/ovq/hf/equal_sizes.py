"""Sizes at which other mixers have as many parameters as an OVQ layer, or a state of as many bytes.

Experiments compare mixers at these sizes. Configs that were saved before the sizes were fields of `OVQConfig`
imply these sizes.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from ovq.layers.memory import num_bytes
from ovq.layers.ovq import slot_spec

#: The fields of `OVQConfig` that `equal_sizes` returns.
EQUAL_SIZES = (
    "delta_value_dim",
    "mamba_head_dim",
    "mamba_state_size",
    "sink_window",
    "kvm_chunk_size",
    "raven_head_dim",
    "kda_value_dim",
)


class Sizes(Protocol):
    """The fields of `OVQConfig` that sizes follow from."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_slots: int
    chunk_size: int
    num_sinks: int
    merge_gate: bool
    forget_gate: bool
    kvm_sinks: int
    raven_slots: int | None


def equal_sizes(config: Sizes) -> dict[str, int]:
    """Values of the fields `EQUAL_SIZES` that make other mixers as large as an `"ovq"` layer of this config.

    `"gated_deltanet"`, `"kda"`, `"mamba2"` and `"raven"` get as many parameters, within a few percent; the
    sizes of their states follow from that, and for `"raven"` from `raven_slots` too. Three quarters of
    Mamba2's weights make x, z and the output, one quarter makes B and C. `"mesanet"` has as many as it is.

    `"sink_attention"` gets a state of as many bytes, in float32. `"kvm"` gets chunks half as long, so that
    its window of two chunks has as many tokens as the chunk of the OVQ layer, beside as many slots.

    Example:
        >>> from ovq.hf import OVQConfig
        >>> sizes = equal_sizes(OVQConfig(num_attention_heads=2, head_dim=64, num_slots=64, chunk_size=64))
        >>> sizes["delta_value_dim"], sizes["mamba_head_dim"], sizes["mamba_state_size"]
        (42, 64, 63)
        >>> sizes["sink_window"], sizes["kvm_chunk_size"], sizes["raven_head_dim"], sizes["kda_value_dim"]
        (126, 32, 47, 40)
    """
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    # Channels of all projections of the OVQ layer together.
    num_projected = 2 * (num_heads + num_kv_heads) * config.head_dim
    num_routed = config.head_dim if config.raven_slots is None else config.raven_slots
    mamba_head_dim = max(1, round(num_projected / (4 * num_heads)))
    return {
        "delta_value_dim": max(1, round(2 * (config.head_dim - 1) / 3)),
        "mamba_head_dim": mamba_head_dim,
        "mamba_state_size": max(1, (num_projected - num_heads * (3 * mamba_head_dim + 1)) // 2),
        "sink_window": window_of_equal_bytes(
            config.num_slots,
            config.chunk_size,
            num_kv_heads=num_kv_heads,
            head_dim=config.head_dim,
            num_sinks=config.num_sinks,
            has_weights=config.merge_gate or config.forget_gate,
            forgets=config.forget_gate,
        ),
        # What its router takes is left to the other projections.
        "raven_head_dim": max(
            1, (num_projected - num_heads * (num_routed + 1)) // (2 * (num_heads + num_kv_heads))
        ),
        "kda_value_dim": max(1, round(_kda_value_dim(config))),
        "kvm_chunk_size": min(max(1 + config.kvm_sinks, config.chunk_size // 2), config.num_slots),
    }


def _kda_value_dim(config: Sizes) -> float:
    """The V at which a `"kda"` layer has the weights of an OVQ layer: the root of a quadratic equation.

    H V^2 weights and as many biases per component make the gate of rank V, `H K V` the decays.
    """
    width, num_heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    linear = width * (2 * num_heads + 2) + num_heads * (head_dim + 1)
    weights = width * num_heads * (2 * head_dim - 1)
    return (math.sqrt(linear**2 + 4 * num_heads * weights) - linear) / (2 * num_heads)


def window_of_equal_bytes(
    num_slots: int,
    chunk_size: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    num_sinks: int,
    has_weights: bool = False,
    forgets: bool = False,
    dtype: torch.dtype = torch.float32,
) -> int:
    """The smallest `sink_window` whose state has at least as many bytes as that of a full dictionary.

    Args:
        num_slots: N of the OVQ layer.
        chunk_size: C of the OVQ layer.
        num_kv_heads: Hkv of both.
        head_dim: K and V of both.
        num_sinks: S of the layer with sinks.
        has_weights: whether the OVQ layer has a gate.
        forgets: whether it has a forget gate.
        dtype: dtype of the activations; the sums of OVQ are float32 in any case.

    Example:
        >>> window_of_equal_bytes(64, 64, num_kv_heads=2, head_dim=64, num_sinks=4)
        126
    """
    slots = slot_spec(
        num_slots,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        chunk_size=chunk_size,
        dtype=dtype,
        has_weights=has_weights,
        forgets=forgets,
    )
    # Both states include the number of tokens seen.
    del slots["num_seen"]
    num_tokens = -(-num_bytes(slots) // (2 * num_kv_heads * head_dim * dtype.itemsize))
    return max(2, num_tokens - num_sinks + 1)
