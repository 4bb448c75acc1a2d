"""One token per row through whole layers of a model in one call of a kernel, where a kernel can do it."""

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
from ovq.layers.layout import SequenceLayout
from ovq.layers.logn import logn_factor
from ovq.layers.products import Linear, can_multiply, plain_parameter
from ovq.ops.backends.cpu.layer import LayerStep, LayerWeights, layer_to_run, run_layers
from ovq.ops.backends.cpu.linear import FEW_TOKENS
from ovq.ops.backends.cpu.tokens import can_run


class TokenStep(NamedTuple):
    """A layer that is ready to run, and its cache, which gets the tokens once it has run."""

    layer: LayerStep
    cache: LayerCache


class AroundMixer(NamedTuple):
    """What a layer has beside its mixer: norms before the mixer and the MLP, and the products of the MLP."""

    mixer_norm: RMSNorm
    mlp_norm: RMSNorm
    gate_up_proj: Linear
    down_proj: Linear


def is_token(hidden_states: Tensor, layout: SequenceLayout) -> bool:
    """Whether a call is one that `token_step` is for: a token for each of a few rows, and no gradient."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or layout.num_new != 1:
        return False
    is_plain = layout.new_mask is None and layout.cu_seqlens is None and not _has_any_global_hook()
    return is_plain and len(hidden_states) <= FEW_TOKENS


def token_step(
    mixer: Mixer, around: AroundMixer, hidden_states: Tensor, layout: SequenceLayout, past_key_values: Any
) -> TokenStep | None:
    """A layer of attention and MLP for the token of each row, in a call that `is_token`.

    Args:
        mixer: the mixer of the layer.
        around: the rest of it.
        hidden_states: `[B, 1, hidden_size]`, what it is to read, or something of the same kind.
        layout: the padding of the call.
        past_key_values: the cache of the model.

    Returns:
        What `run_steps` takes; None where no kernel can do it: hooks, adapters, other mixers or dtypes, or a
        cache that holds nothing yet.
    """
    if not isinstance(mixer, AttentionMixer):
        return None
    weights = _weights(mixer, around)
    if weights is None or weights.qkv.shape[1] != hidden_states.shape[2]:
        return None
    cache = mixer.cache_of_layer(past_key_values)
    check_cache_use(cache, layout)
    # As in `Mixer.forward`: here, where the mask is at hand.
    cache.has_padding = layout.mask is not None
    past = cache.conv_state
    tensors = [hidden_states, *weights[:7]]
    if weights.taps is not None:
        shape = (len(hidden_states), len(weights.taps), mixer.conv_size - 1)
        if past is None or past.shape != shape or not can_run(past):
            return None
        tensors.append(weights.taps)
    if not can_multiply(*tensors) or (memory := mixer.token_memory(layout, cache)) is None:
        return None
    if memory.decode.num_rows != len(hidden_states):
        return None
    mixer_eps, mlp_eps = around.mixer_norm.eps, around.mlp_norm.eps
    if mixer_eps is None or mlp_eps is None:
        return None
    if mixer.logn_length is not None:
        # Of the mixers that a kernel knows, the one that scales logits counts what it reads.
        places = {num_seen + 1 for num_seen in cache.state.num_seen.tolist()}
        if len(places) > 1 and max(places) > mixer.logn_length:
            return None
        weights = weights._replace(beta=weights.beta * logn_factor(max(places), mixer.logn_length))
    tables = _tables(layout.num_past, mixer.head_dim, mixer.rope_theta) if mixer.use_rope else None
    return TokenStep(layer_to_run(weights, (mixer_eps, mlp_eps), memory, past, tables), cache)


def run_steps(hidden_states: Tensor, steps: Sequence[TokenStep]) -> Tensor | None:
    """`[B, 1, hidden_size]` through consecutive layers; None if they must run by their modules after all."""
    done = run_layers(hidden_states, [step.layer for step in steps])
    if done is not None:
        for layer, cache in steps:
            cache.conv_state = layer.conv_state
            cache.set_state(layer.memory.finished(), 1)
    return done


# Positions whose tables are made together: a dozen operations on tensors, for one token or for many.
_POSITIONS = 64


def _tables(position: int, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """The `rotary_tables` of one position, of which kernels take the place in memory."""
    cos, sin = _tables_of_block(position // _POSITIONS, dim, theta)
    return cos[position % _POSITIONS], sin[position % _POSITIONS]


@functools.lru_cache(maxsize=16)
def _tables_of_block(block: int, dim: int, theta: float) -> list[tuple[Tensor, ...]]:
    like = torch.empty(0, dtype=torch.float32, device="cpu")
    positions = torch.arange(_POSITIONS, device="cpu") + block * _POSITIONS
    tables = rotary_tables(positions, dim, theta=theta, like=like)
    return [table.split(1) for table in tables]


def _weights(mixer: AttentionMixer, around: AroundMixer) -> LayerWeights | None:
    """The weights of a layer, if all of its modules are plain and their weights dense."""
    found = [
        plain_parameter(around.mixer_norm, RMSNorm),
        plain_parameter(mixer.qkv_proj, Linear),
        plain_parameter(mixer.qk_norm, QKNorm, "beta"),
        plain_parameter(mixer.o_proj, Linear),
        plain_parameter(around.mlp_norm, RMSNorm),
        plain_parameter(around.gate_up_proj, Linear),
        plain_parameter(around.down_proj, Linear),
    ]
    if mixer.qkv_conv is not None:
        found.append(plain_parameter(mixer.qkv_conv, ShortConvolution))
    weights = [weight for weight in found if weight is not None]
    return LayerWeights(*weights) if len(weights) == len(found) else None
