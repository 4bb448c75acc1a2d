"""One layer of the OVQ language model: a mixer and an MLP."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ovq.hf.cache import OVQCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers import Mixer, SequenceLayout, mixer_class
from ovq.layers.common import RMSNorm, swiglu
from ovq.layers.products import Linear, is_plain
from ovq.layers.token_step import AroundMixer, TokenStep, run_steps, token_step


def build_mixer(config: OVQConfig, layer_idx: int) -> Mixer:
    """The mixer of a layer, as the config defines it."""
    name = config.mixer_types[layer_idx]
    cls = mixer_class(name)
    # Beyond what all take, constructors take the fields of the config that they name.
    make: Callable[..., Mixer] = cls
    return make(
        layer_idx=layer_idx,
        use_rope=name in config.rope_mixers,
        **cls.arguments_of(config),
    )


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
    """One layer: mixer and MLP, each on the normalised stream and added to it."""

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
        """`[B, T, hidden_size]` to the same, and in training the mixer's own loss, if it has one.

        The loss is an output, because nothing else gets through reentrant checkpointing and offloading hooks.
        """
        options: dict[str, Any] = {}
        own_loss = None
        if step is not None:
            options["step"] = step
        has_loss = self.training and "auxiliary_losses" in self.mixer.forward_options
        if has_loss:
            # Not a list, because accelerate's hooks pass on copies of lists.
            losses: deque[Tensor] = deque()
            options["auxiliary_losses"] = losses
        mixed, _, _ = self.mixer(self.mixer_norm(hidden_states), attention_mask, past_key_values, **options)
        if has_loss:
            (own_loss,) = losses
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.mlp_norm(hidden_states)), own_loss

    def token_step(
        self, hidden_states: Tensor, layout: SequenceLayout, past_key_values: OVQCache
    ) -> TokenStep | None:
        """The layer as a part of one call of a kernel, see `ovq.layers.token_step`; None if it is none."""
        mlp = self.mlp
        if not is_plain(mlp, OVQMLP):
            return None
        around = AroundMixer(self.mixer_norm, self.mlp_norm, mlp.gate_up_proj, mlp.down_proj)
        return token_step(self.mixer, around, hidden_states, layout, past_key_values)


def with_steps(
    layers: list[OVQBlock], hidden_states: Tensor, layout: SequenceLayout, past_key_values: OVQCache
) -> tuple[Tensor, list[OVQBlock]]:
    """The stream after as many of the first layers as one call of a kernel can run, and the other layers.

    For calls that are `ovq.layers.token_step.is_token`. After a layer that no kernel can run, it is called
    once more for those that follow.
    """
    steps: list[TokenStep] = []
    for layer in layers:
        step = layer.token_step(hidden_states, layout, past_key_values) if is_plain(layer, OVQBlock) else None
        if step is None:
            break
        steps.append(step)
    done = run_steps(hidden_states, steps) if steps else None
    return (hidden_states, layers) if done is None else (done, layers[len(steps) :])
