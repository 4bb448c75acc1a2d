"""Decode step of whole layers (attention and MLP) in one kernel call, where a kernel supports it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from ovq.layers.base import AttentionMixer, Mixer, check_cache_use
from ovq.layers.cache import LayerCache
from ovq.layers.common import QKNorm, RMSNorm, ShortConvolution, rotary_tables
from ovq.layers.gates import OutputGate
from ovq.layers.layout import SequenceLayout
from ovq.layers.logn import logn_factor
from ovq.layers.products import Linear, can_multiply, is_plain, plain_parameter
from ovq.ops.backends.cpu.layer import LayerStep, LayerWeights, layer_to_run, run_layers
from ovq.ops.backends.cpu.linear import FEW_TOKENS
from ovq.ops.backends.cpu.tokens import can_run


class TokenStep(NamedTuple):
    """A prepared layer, and its cache, which is updated after the layer has run."""

    layer: LayerStep
    cache: LayerCache


class AroundMixer(NamedTuple):
    """The modules of a layer besides its mixer: norms before the mixer and the MLP, and the MLP's weights."""

    mixer_norm: RMSNorm
    mlp_norm: RMSNorm
    gate_up_proj: Linear
    down_proj: Linear


def is_token(hidden_states: Tensor, layout: SequenceLayout) -> bool:
    """Whether `token_step` applies to a call: one token for each of a few rows, without gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or layout.num_new != 1:
        return False
    is_plain = layout.new_mask is None and layout.cu_seqlens is None and not _has_any_global_hook()
    return is_plain and len(hidden_states) <= FEW_TOKENS


def token_step(
    mixer: Mixer, around: AroundMixer, hidden_states: Tensor, layout: SequenceLayout, past_key_values: Any
) -> TokenStep | None:
    """Prepare a layer (attention and MLP) for one token per row, in a call for which `is_token` holds.

    Args:
        hidden_states: `[B, 1, hidden_size]`, its input, or a tensor of the same shape, dtype and device.

    Returns:
        An argument of `run_steps`; None if no kernel supports the layer (hooks, adapters, other mixers or
        dtypes) or the cache is still empty.
    """
    if not isinstance(mixer, AttentionMixer):
        return None
    weights = _weights(mixer, around)
    if weights is None or weights.qkv.shape[1] != hidden_states.shape[2]:
        return None
    cache = mixer.cache_of_layer(past_key_values)
    check_cache_use(cache, layout)
    # As in `Mixer.forward`; set here, where the layout is available.
    cache.has_padding = layout.mask is not None
    past = cache.conv_state
    if weights.taps is not None:
        shape = (len(hidden_states), len(weights.taps), mixer.conv_size - 1)
        if past is None or past.shape != shape or not can_run(past):
            return None
    tensors = [weight for weight in weights if weight is not None]
    if not can_multiply(hidden_states, *tensors) or (memory := mixer.token_memory(layout, cache)) is None:
        return None
    if memory.decode.num_rows != len(hidden_states):
        return None
    mixer_eps, mlp_eps = around.mixer_norm.eps, around.mlp_norm.eps
    output_eps = 0.0 if mixer.output_gate is None else mixer.output_gate.norm.eps
    if mixer_eps is None or mlp_eps is None or output_eps is None:
        return None
    if mixer.logn_length is not None:
        # Only OVQ has both a kernel and log-n scaling, so the state has `num_seen`.
        places = {num_seen + 1 for num_seen in cache.state.num_seen.tolist()}
        if len(places) > 1 and max(places) > mixer.logn_length:
            return None
        weights = weights._replace(beta=weights.beta * logn_factor(max(places), mixer.logn_length))
    tables = _tables(layout.num_past, mixer.head_dim, mixer.rope_theta) if mixer.use_rope else None
    return TokenStep(layer_to_run(weights, (mixer_eps, mlp_eps, output_eps), memory, past, tables), cache)


def run_steps(hidden_states: Tensor, steps: Sequence[TokenStep]) -> Tensor | None:
    """Outputs `[B, 1, hidden_size]` of consecutive layers; None if their modules must run instead."""
    done = run_layers(hidden_states, [step.layer for step in steps])
    if done is not None:
        for layer, cache in steps:
            cache.conv_state = layer.conv_state
            cache.set_state(layer.memory.finished(), 1)
    return done


# Positions per cached block of rotary tables: a dozen tensor operations, for one position or for many.
_POSITIONS = 64


def _tables(position: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """`rotary_tables` of one position, as contiguous tensors whose addresses kernels use."""
    cos, sin = _tables_of_block(position // _POSITIONS, dim, theta)
    return cos[position % _POSITIONS], sin[position % _POSITIONS]


@functools.lru_cache(maxsize=16)
def _tables_of_block(block: int, dim: int, theta: float) -> list[tuple[Tensor, ...]]:
    like = torch.empty(0, dtype=torch.float32, device="cpu")
    positions = torch.arange(_POSITIONS, device="cpu") + block * _POSITIONS
    tables = rotary_tables(positions, dim, theta=theta, like=like)
    return [table.split(1) for table in tables]


def _weights(mixer: AttentionMixer, around: AroundMixer) -> LayerWeights | None:
    """The weights of a layer if all its modules are plain and the weights contiguous, else None."""
    found = {
        "mixer_norm": plain_parameter(around.mixer_norm, RMSNorm),
        "qkv": plain_parameter(mixer.qkv_proj, Linear),
        "beta": plain_parameter(mixer.qk_norm, QKNorm, "beta"),
        "o": plain_parameter(mixer.o_proj, Linear),
        "mlp_norm": plain_parameter(around.mlp_norm, RMSNorm),
        "gate_up": plain_parameter(around.gate_up_proj, Linear),
        "down": plain_parameter(around.down_proj, Linear),
    }
    if mixer.qkv_conv is not None:
        found["taps"] = plain_parameter(mixer.qkv_conv, ShortConvolution)
    if (gate := mixer.output_gate) is not None:
        if not is_plain(gate, OutputGate):
            return None
        found["output_gate"] = plain_parameter(gate.proj, Linear)
        found["output_norm"] = plain_parameter(gate.norm, RMSNorm)
    weights = {name: weight for name, weight in found.items() if weight is not None}
    return LayerWeights(**weights) if len(weights) == len(found) else None
