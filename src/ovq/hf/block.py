"""One layer of the OVQ language model: a mixer and an MLP."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ovq.hf.cache import OVQCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.layers import Mixer, SequenceLayout, mixer_class
from ovq.layers.common import RMSNorm, swiglu
from ovq.layers.products import Linear, can_multiply, is_plain
from ovq.ops.backends.cpu import FEW_TOKENS, mlp_step


def build_mixer(config: OVQConfig, layer_idx: int) -> Mixer:
    """The mixer of a layer, as the config defines it."""
    name = config.mixer_types[layer_idx]
    cls = mixer_class(name)
    # Beyond what all take, constructors take the fields of the config that they name.
    make: Callable[..., Mixer] = cls
    return make(
        layer_idx=layer_idx,
        use_rope=name in config.rope_mixers,
        **{argument: getattr(config, field) for argument, field in cls.config_fields.items()},
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
        if self._is_step(hidden_states):
            norm, mlp = self.mlp_norm, self.mlp
            weights = mlp.gate_up_proj.weight, mlp.down_proj.weight
            assert norm.eps is not None, "OVQConfig has a number"
            return mlp_step(hidden_states, norm.weight, norm.eps, *weights), own_loss
        return hidden_states + self.mlp(self.mlp_norm(hidden_states)), own_loss

    def _is_step(self, hidden_states: Tensor) -> bool:
        """Whether one call of a kernel can do norm and MLP: a few tokens, no gradient, nobody looking on."""
        if torch.is_grad_enabled() or hidden_states.shape[:-1].numel() > FEW_TOKENS:
            return False
        norm, mlp = self.mlp_norm, self.mlp
        parts = ((norm, RMSNorm), (mlp, OVQMLP), (mlp.gate_up_proj, Linear), (mlp.down_proj, Linear))
        if not all(is_plain(module, kind) for module, kind in parts):
            return False
        weights = norm.weight, mlp.gate_up_proj.weight, mlp.down_proj.weight
        return can_multiply(hidden_states, *weights) and all(weight.is_contiguous() for weight in weights)
