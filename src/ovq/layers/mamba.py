"""Mamba2 (Dao and Gu 2024, arXiv 2405.21060): a state space model with a scalar decay a head, in chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.layers import defaults
from ovq.layers.base import checked_heads
from ovq.layers.cache import LayerCache
from ovq.layers.chunked import DecayRates, decay_between, from_chunks, to_chunks
from ovq.layers.constant import ConstantStateMixer, sum_dtype, without_autocast
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec

# Tokens whose products are formed pair by pair. A tiling choice.
CHUNK = 64


class Mamba2(ConstantStateMixer):
    """Mamba2's mixer: gated, with SiLU after the convolution, one group of B and C, and a skip.

    `S_t = a_t S_{t-1} + B_t (dt_t x_t)^T`, `y_t = S_t^T C_t + D x_t`, `o_t = norm(y_t silu(z_t))`, for each
    of H heads of P channels with a state of N x P numbers. P and N are chosen so that the layer has as many
    parameters as an attention layer of these heads: three quarters of the weights for x, z and the output, a
    quarter for B and C.

    Args:
        hidden_size: width of the model.
        num_heads: heads H.
        num_kv_heads: of the attention layer that sets the size; divides H. None: as many as query heads.
        head_dim: of that layer. None: `hidden_size / num_heads`.
        mamba_state_size: N. None: as many as parameters allow, about `num_kv_heads head_dim / 2`.
        conv_size: taps of the causal depthwise convolution on x, B and C; 0 for none.
        layer_idx: the layer's place in the cache; None stands for 0.
        use_rope: refused if True.
        rope_theta: not used.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> layer = Mamba2(32, num_heads=2)
        >>> _, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> cache.layers[0].state["ssm"].shape
        torch.Size([1, 2, 15, 16])
    """

    state_kind = "the state of Mamba2"
    config_fields = ("mamba_state_size",)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        mamba_state_size: int | None = None,
        conv_size: int = defaults.CONV_SIZE,
        layer_idx: int | None = None,
        use_rope: bool = False,
        rope_theta: float = defaults.ROPE_THETA,
    ):
        self.check_rope(use_rope)
        num_kv_heads, head_dim = checked_heads(
            hidden_size, num_heads, num_kv_heads, head_dim, conv_size, use_rope
        )
        # Channels of all projections of the attention layer.
        num_projected = 2 * (num_heads + num_kv_heads) * head_dim
        channels_per_head = max(1, round(num_projected / (4 * num_heads)))
        num_inner = num_heads * channels_per_head
        if mamba_state_size is None:
            mamba_state_size = max(1, (num_projected - 3 * num_inner - num_heads) // 2)
        if mamba_state_size < 1:
            raise ValueError(f"expected a mamba_state_size of at least 1, found {mamba_state_size}")
        super().__init__(
            hidden_size,
            num_channels=num_inner + 2 * mamba_state_size,
            num_outputs=num_inner,
            conv_size=conv_size,
            layer_idx=layer_idx,
        )
        self.num_heads, self.head_dim, self.state_size = num_heads, channels_per_head, mamba_state_size
        # Gate z of the output, and step sizes.
        self.gate_proj = nn.Linear(hidden_size, num_inner + num_heads, bias=False)
        self.rates = DecayRates(num_heads)
        self.skip = nn.Parameter(torch.ones(num_heads))
        self.out_norm = nn.RMSNorm(num_inner, eps=1e-5)

    def reset_parameters(self) -> None:
        """Set the skip to 1."""
        nn.init.ones_(self.skip)

    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """The state of each head."""
        return {"ssm": ((self.num_heads, self.state_size, self.head_dim), sum_dtype(dtype))}

    def mix(
        self,
        channels: Tensor,
        hidden_states: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
        **options,
    ) -> Tensor:
        """See `Mixer.mix`."""
        rows = layout.rows()
        num_inner = self.num_heads * self.head_dim
        x, b, c = F.silu(channels).split([num_inner, self.state_size, self.state_size], dim=-1)
        gate, step = self.gate_proj(hidden_states).split([num_inner, self.num_heads], dim=-1)
        step, log_decay = self.rates(step)
        x = x.unflatten(-1, (self.num_heads, -1)).to(step.dtype)
        inputs = (x * step[..., None], log_decay, b.to(step.dtype), c.to(step.dtype))
        # Where there is no token, zeros: the state neither decays nor is written to.
        written, log_decay, b, c = (rows.take(t) for t in inputs)
        before = self.state_before(cache, len(b), channels)
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
        x: `[B, T, H, P]`, what is written, step size included.
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
    states = []
    for i in range(x.shape[2]):
        states.append(state)
        state = state * since_start[:, :, i, -1:] + added[:, :, i]
    from_state = c @ torch.stack(states, 2) * since_start
    return from_chunks(within + from_state, num_tokens), state
