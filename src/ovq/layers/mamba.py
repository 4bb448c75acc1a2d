"""Mamba2 (Dao and Gu 2024, arXiv 2405.21060): a state space model with a scalar decay per head, in chunks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.fields import ConfigField
from ovq.layers.base import Mixer
from ovq.layers.cache import LayerCache
from ovq.layers.chunked import DecayRates, decay_between, decayed_sums, from_chunks, to_chunks
from ovq.layers.common import OwnWeights, without_autocast
from ovq.layers.constant import ConstantStateMixer, sum_dtype
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec
from ovq.layers.sizes import checked_head_dim, num_projected
from ovq.ops.options import check_sizes

STATE_SIZE = 128

# Tokens per chunk, within which all pairs are computed. A tiling choice.
CHUNK = 64


class Mamba2(ConstantStateMixer, OwnWeights):
    """Mamba2's mixer: gated, with SiLU after the convolution, one group of B and C, and a skip connection.

    `S_t = a_t S_{t-1} + B_t (dt_t x_t)^T`, `y_t = S_t^T C_t + D x_t`, `o_t = norm(y_t silu(z_t))`, for each
    of H heads of P channels with a state of N x P numbers. By default x is twice as wide as the model, as in
    the paper.

    Args:
        hidden_size: width of the model.
        num_heads: heads H.
        head_dim: P. None: `2 hidden_size / num_heads`.
        state_size: N.
        kwargs: `conv_size` and `layer_idx` of `Mixer`.

    Raises:
        ValueError: if sizes are inconsistent.

    Example:
        >>> layer = Mamba2(32, num_heads=2)
        >>> _, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> cache.layers[0].state["ssm"].shape
        torch.Size([1, 2, 128, 32])
    """

    state_kind = "the state of Mamba2"
    config_fields = Mixer.config_fields | {
        "num_heads": "num_attention_heads",
        "head_dim": ConfigField(
            int | None,
            None,
            "channels per head; None: `2 hidden_size / num_attention_heads`",
            name="mamba_head_dim",
            at_least=1,
        ),
        "state_size": ConfigField(
            int, STATE_SIZE, "size of the state per channel", name="mamba_state_size", at_least=1
        ),
    }

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        state_size: int = STATE_SIZE,
        **kwargs: Any,
    ):
        share = checked_head_dim(hidden_size, num_heads, num_heads, head_dim)
        head_dim = 2 * share if head_dim is None else head_dim
        check_sizes(1, state_size=state_size)
        num_inner = num_heads * head_dim
        super().__init__(
            hidden_size, num_channels=num_inner + 2 * state_size, num_outputs=num_inner, **kwargs
        )
        self.num_heads, self.head_dim, self.state_size = num_heads, head_dim, state_size
        # Projects to the output gate z and the step sizes.
        self.gate_proj = nn.Linear(hidden_size, num_inner + num_heads, bias=False)
        self.rates = DecayRates(num_heads)
        self.skip = nn.Parameter(torch.ones(num_heads))
        self.out_norm = nn.RMSNorm(num_inner, eps=1e-5)

    @classmethod
    def equal_sizes(cls, config: Any) -> dict[str, int]:
        """Sizes for equally many parameters: three quarters for x, z and the output, one for B and C."""
        num_heads = config.num_attention_heads
        num_vectors = num_projected(config)
        head_dim = max(1, round(num_vectors / (4 * num_heads)))
        state_size = max(1, (num_vectors - num_heads * (3 * head_dim + 1)) // 2)
        return {"mamba_head_dim": head_dim, "mamba_state_size": state_size}

    def reset_parameters(self) -> None:
        """Set the weights of the skip connection to 1."""
        nn.init.ones_(self.skip)

    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """Specification of the state of each head."""
        return {"ssm": ((self.num_heads, self.state_size, self.head_dim), sum_dtype(dtype))}

    def mix(
        self,
        channels: Tensor,
        hidden_states: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
        **options: Any,
    ) -> Tensor:
        """See `Mixer.mix`."""
        rows = layout.rows()
        num_inner = self.num_heads * self.head_dim
        x, b, c = F.silu(channels).split([num_inner, self.state_size, self.state_size], dim=-1)
        gate, step = self.gate_proj(hidden_states).split([num_inner, self.num_heads], dim=-1)
        step, log_decay = self.rates(step)
        x = x.unflatten(-1, (self.num_heads, -1)).to(step.dtype)
        inputs = (x * step[..., None], log_decay, b.to(step.dtype), c.to(step.dtype))
        # Zeros at padding, so that the state neither decays nor is written to.
        written, log_decay, b, c = (rows.take(t) for t in inputs)
        before = self.state_before(cache, b.shape[0], channels)
        with without_autocast(b):
            y, ssm = state_space_scan(written, log_decay, b, c, before["ssm"])
        if cache is not None:
            cache.set_state({"ssm": ssm}, layout.num_new)
        y = rows.put(y) + x * self.skip.to(x.dtype)[:, None]
        gated = y.flatten(2) * F.silu(gate.to(y.dtype))
        return self.out_norm(gated.to(self.out_norm.weight.dtype)).to(channels.dtype)


def state_space_scan(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence `S_t = exp(log_decay_t) S_{t-1} + b_t x_t^T`, `y_t = S_t^T c_t`, chunk by chunk.

    Args:
        x: `[B, T, H, P]` inputs, multiplied by the step size.
        log_decay: `[B, T, H]`, at most 0.
        b: `[B, T, N]`, shared by the heads.
        c: `[B, T, N]`, shared by the heads.
        state: `[B, H, N, P]`.

    Returns:
        `[B, T, H, P]`, and the state after the last token.
    """
    num_tokens = x.shape[1]
    chunk = min(CHUNK, num_tokens)
    x, log_decay, b, c = (to_chunks(t, chunk) for t in (x, log_decay, b[:, :, None], c[:, :, None]))
    total = log_decay.cumsum(-1)
    within = (c @ b.transpose(-1, -2) * decay_between(total)) @ x
    since_start, to_end = total.exp()[..., None], (total[..., -1:] - total).exp()[..., None]
    added = b.transpose(-1, -2) @ (x * to_end)
    before, state = decayed_sums(state, since_start[..., -1:, :], added)
    from_state = c @ before * since_start
    return from_chunks(within + from_state, num_tokens), state
