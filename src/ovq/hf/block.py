"""One layer of the OVQ language model: a mixer and an MLP. Where kernels support it, a call of one token per
row runs several layers at once."""

from __future__ import annotations

import functools
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from ovq.hf.cache import OVQCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers import AttentionMixer, LayerCache, Mixer, SequenceLayout, ShortConvolution, mixer_class
from ovq.layers.base import check_cache_use
from ovq.layers.common import QKNorm, RMSNorm, rotary_tables, swiglu
from ovq.layers.gates import OutputGate
from ovq.layers.logn import logn_factor
from ovq.layers.products import Linear, can_multiply, is_plain, plain_parameter
from ovq.ops.backends.cpu.layer import LayerStep, LayerWeights, layer_to_run, run_layers
from ovq.ops.backends.cpu.linear import FEW_TOKENS
from ovq.ops.backends.cpu.tokens import can_run

TokenStep = tuple[LayerStep, LayerCache]
"""A layer prepared for `run_layers`, and its cache, which is updated after the layer has run."""


def build_mixer(config: OVQConfig, layer_idx: int) -> Mixer:
    """The mixer of a layer, as the config defines it."""
    name = config.mixer_types[layer_idx]
    # Besides the common arguments, each constructor takes the config fields that it declares.
    cls: Any = mixer_class(name)
    return cls(layer_idx=layer_idx, use_rope=name in config.rope_mixers, **cls.arguments_of(config))


class OVQMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: OVQConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, hidden_size]` to the same."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class OVQBlock(GradientCheckpointingLayer):
    """One pre-norm layer: mixer and MLP, each with a residual connection."""

    def __init__(self, config: OVQConfig, layer_idx: int):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = build_mixer(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = OVQMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: SequenceLayout,
        past_key_values: OVQCache | None = None,
        step: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states `[B, T, hidden_size]`, and in training the mixer's auxiliary loss, if it has one.

        The loss is an output, because only outputs survive reentrant checkpointing and offloading hooks.
        """
        options: dict[str, Any] = {} if step is None else {"step": step}
        # Not a list, because accelerate's hooks copy lists.
        losses: deque[Tensor] = deque()
        if self.training and "auxiliary_losses" in self.mixer.forward_options:
            options["auxiliary_losses"] = losses
        mixed, _, _ = self.mixer(self.mixer_norm(hidden_states), attention_mask, past_key_values, **options)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states)), losses[0] if losses else None

    def token_step(
        self, hidden_states: Tensor, layout: SequenceLayout, past_key_values: OVQCache
    ) -> TokenStep | None:
        """Prepare the layer for one token per row, in a call for which `is_token` holds.

        Args:
            hidden_states: `[B, 1, hidden_size]`, its input, or a tensor of the same shape, dtype and device.

        Returns:
            The layer for `run_layers`, and its cache; None if no kernel supports the layer (hooks, adapters,
            other mixers or dtypes) or the cache is still empty.
        """
        mixer = self.mixer
        if not isinstance(mixer, AttentionMixer) or not is_plain(self.mlp, OVQMLP):
            return None
        weights = self._weights(mixer)
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
        mixer_eps, mlp_eps = self.mixer_norm.eps, self.mlp_norm.eps
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
        return layer_to_run(weights, (mixer_eps, mlp_eps, output_eps), memory, past, tables), cache

    def _weights(self, mixer: AttentionMixer) -> LayerWeights | None:
        """The weights if all modules are plain and the weights contiguous, else None."""
        found = {
            "mixer_norm": plain_parameter(self.mixer_norm, RMSNorm),
            "qkv": plain_parameter(mixer.qkv_proj, Linear),
            "beta": plain_parameter(mixer.qk_norm, QKNorm, "beta"),
            "o": plain_parameter(mixer.o_proj, Linear),
            "mlp_norm": plain_parameter(self.mlp_norm, RMSNorm),
            "gate_up": plain_parameter(self.mlp.gate_up_proj, Linear),
            "down": plain_parameter(self.mlp.down_proj, Linear),
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


def is_token(hidden_states: Tensor, layout: SequenceLayout) -> bool:
    """Whether `with_steps` applies to a call: one token for each of a few rows, without gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or layout.num_new != 1:
        return False
    if layout.new_mask is not None or layout.cu_seqlens is not None or _has_any_global_hook():
        return False
    return len(hidden_states) <= FEW_TOKENS


#: Python module of the hooks of `output_hidden_states`, which transformers leaves on layers after the first
#: such call. In other calls they do nothing.
CAPTURING = output_capturing.__name__


def with_steps(
    layers: list[OVQBlock], hidden_states: Tensor, layout: SequenceLayout, past_key_values: OVQCache
) -> tuple[Tensor, list[OVQBlock]]:
    """Hidden states after as many of the first layers as one kernel call can run, and the remaining layers.

    For calls that capture no outputs and for which `is_token` holds. After a layer that kernels cannot run,
    it is called again for the layers that follow.
    """
    steps: list[TokenStep] = []
    for layer in layers:
        is_own = is_plain(layer, OVQBlock, CAPTURING)
        step = layer.token_step(hidden_states, layout, past_key_values) if is_own else None
        if step is None:
            break
        steps.append(step)
    done = run_layers(hidden_states, [ready for ready, _ in steps]) if steps else None
    if done is None:
        return hidden_states, layers
    for ready, cache in steps:
        cache.conv_state = ready.conv_state
        cache.set_state(ready.memory.finished(), 1)
    return done, layers[len(steps) :]


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
