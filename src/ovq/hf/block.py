"""One layer of the OVQ language model: a mixer and an MLP."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

from ovq.hf.cache import OVQCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers import Mixer, SequenceLayout, mixer_class
from ovq.layers.common import RMSNorm, swiglu
from ovq.layers.products import Linear, is_plain
from ovq.layers.token_step import AroundMixer, TokenStep, run_steps, token_step


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
        """The layer as a step of a kernel call (`ovq.layers.token_step`); None if kernels cannot run it."""
        mlp = self.mlp
        if not is_plain(mlp, OVQMLP):
            return None
        around = AroundMixer(self.mixer_norm, self.mlp_norm, mlp.gate_up_proj, mlp.down_proj)
        return token_step(self.mixer, around, hidden_states, layout, past_key_values)


#: Python module of the hooks of `output_hidden_states`, which transformers leaves on layers after the first
#: such call. In other calls they do nothing.
CAPTURING = output_capturing.__name__


def with_steps(
    layers: list[OVQBlock], hidden_states: Tensor, layout: SequenceLayout, past_key_values: OVQCache
) -> tuple[Tensor, list[OVQBlock]]:
    """Hidden states after as many of the first layers as one kernel call can run, and the remaining layers.

    For calls that capture no outputs and for which `ovq.layers.token_step.is_token` holds. After a layer that
    kernels cannot run, it is called again for the layers that follow.
    """
    steps: list[TokenStep] = []
    for layer in layers:
        is_own = is_plain(layer, OVQBlock, CAPTURING)
        step = layer.token_step(hidden_states, layout, past_key_values) if is_own else None
        if step is None:
            break
        steps.append(step)
    done = run_steps(hidden_states, steps) if steps else None
    return (hidden_states, layers) if done is None else (done, layers[len(steps) :])
