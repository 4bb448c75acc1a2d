"""Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692): the delta rule with a decay per channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ovq.fields import ConfigField
from ovq.layers.chunked import DecayRates, can_use_fla, delta_rule_in_chunks, from_chunks, to_chunks
from ovq.layers.delta_rule import DeltaRuleMixer, Rule
from ovq.layers.heads import HeadsMixer
from ovq.layers.sizes import checked_head_dim, num_projected
from ovq_lab.mixers.norms import WideRMSNorm

# Tokens per triangular system, a power of two. A tiling choice.
CHUNK = 32


class KimiDeltaAttention(DeltaRuleMixer):
    """Delta rule with a decay per row of the state; every token corrects the state towards `S^T k = v`.

    `S_t = (I - b_t k_t k_t^T) Diag(a_t) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`, with decays
    `a_t` in (0, 1)^K and a rate `b_t` in (0, 1) computed from the token. Gated DeltaNet has one decay per
    head. Decays and the output gate come from projections of rank V.

    Args:
        hidden_size: width of the model.
        num_heads: heads H of values and states.
        num_kv_heads: heads Hkv of queries and keys; divides H. None: as many as `num_heads`.
        head_dim: K. None: `hidden_size / num_heads`.
        kda_value_dim: V. None: K, as published.
        kwargs: `conv_size` and `layer_idx` of `Mixer`.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> layer = KimiDeltaAttention(32, num_heads=2)
        >>> _, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> cache.layers[0].state["delta"].shape
        torch.Size([1, 2, 16, 16])
    """

    state_kind = "the matrices of Kimi Delta Attention"
    config_fields = HeadsMixer.config_fields | {
        "kda_value_dim": ConfigField(int | None, None, "components of a value; None: `head_dim`", at_least=1),
    }

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        kda_value_dim: int | None = None,
        **kwargs: Any,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = checked_head_dim(hidden_size, num_heads, num_kv_heads, head_dim)
        value_dim = head_dim if kda_value_dim is None else kda_value_dim
        if value_dim < 1:
            raise ValueError(f"kda_value_dim: expected at least 1, found {value_dim}")
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, value_dim, **kwargs)
        # Projects to the inputs of `decay_up_proj` and `gate_up_proj`, and to the rate.
        self.gate_proj = nn.Linear(hidden_size, 2 * value_dim + num_heads, bias=False)
        self.decay_up_proj = nn.Linear(value_dim, num_heads * head_dim, bias=False)
        self.gate_up_proj = nn.Linear(value_dim, num_heads * value_dim)
        self.rates = DecayRates(num_heads, head_dim)
        self.out_norm = WideRMSNorm(value_dim, eps=1e-5)

    @classmethod
    def equal_sizes(cls, config: Any) -> dict[str, int]:
        """`kda_value_dim` at which the layer has as many parameters: the root of a quadratic equation in V.

        `gate_up_proj` has `H V^2` weights and `H V` biases, `decay_up_proj` `H K V` weights.
        """
        width, num_heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        linear = width * (2 * num_heads + 2) + num_heads * (head_dim + 1)
        weights = width * (num_projected(config) - 2 * config.num_key_value_heads * head_dim - num_heads)
        root = (math.sqrt(linear**2 + 4 * num_heads * weights) - linear) / (2 * num_heads)
        return {"kda_value_dim": max(1, round(root))}

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `DeltaRuleMixer.gates`."""
        decay, gate, rate = self.gate_proj(hidden_states).split(
            [self.value_dim, self.value_dim, self.num_heads], dim=-1
        )
        decay = self.decay_up_proj(decay).unflatten(-1, (self.num_heads, -1))
        return gate, self.rates(decay)[1], rate

    def rule(self, like: Tensor) -> Rule:
        """See `DeltaRuleMixer.rule`."""
        return _kimi_delta_rule_of_fla if can_use_fla(like) else kimi_delta_rule

    def gated(self, outputs: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """See `DeltaRuleMixer.gated`."""
        outputs = self.out_norm(outputs).flatten(2)
        return (outputs * self.gate_up_proj(gate).to(outputs.dtype).sigmoid()).to(dtype)


def kimi_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The delta rule with a decay per channel of the keys, in chunks.

    Args:
        q: `[B, T, Hk, K]`, normalised; this function scales it by `1 / sqrt(K)`. Hk divides H.
        k: `[B, T, Hk, K]`, normalised.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H, K]`, at most 0.
        rate: `[B, T, H]`, in [0, 1].
        state: `[B, H, K, V]`.

    Returns:
        `[B, T, H, V]`, and the state after the last token.
    """
    num_tokens, num_heads = v.shape[1:3]
    q, k = (x.repeat_interleave(num_heads // x.shape[2], dim=2) for x in (q * q.shape[-1] ** -0.5, k))
    chunk = min(CHUNK, 1 << (num_tokens - 1).bit_length())
    q, k, v, log_decay, rate = (to_chunks(x, chunk) for x in (q, k, v, log_decay, rate))
    total = log_decay.cumsum(-2)
    since_start = total.exp()
    query_products, key_products = decayed_products(torch.stack([q, k]), k, total)
    o, state = delta_rule_in_chunks(
        v,
        rate,
        state,
        q_since_start=q * since_start,
        k_since_start=k * since_start,
        k_to_end=k * (total[..., -1:, :] - total).exp(),
        query_products=query_products,
        key_products=key_products,
        kept=since_start[..., -1, :, None],
    )
    return from_chunks(o, num_tokens), state


def decayed_products(x: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """Dot products of the tokens of a chunk, with each channel decayed from the earlier to the later token.

    The tokens of both halves of a chunk are decayed to the border between the halves and multiplied as
    matrices; each half is then treated likewise, recursively. No exponent is above 0, so nothing overflows,
    however fast channels decay, and no C x C x K tensor is formed.

    Args:
        x: `[..., C, K]`, C a power of two.
        k: `[..., C, K]`.
        total: `[..., C, K]`, sums of the logarithms of the decays up to each token of the chunk.

    Returns:
        `[..., C, C]`, row i, column j: `sum_c x_ic k_jc exp(total_ic - total_jc)`; 0 for j > i.
    """
    products = (x * k).sum(-1)[..., None, None]
    size = 1
    while size < k.shape[-2]:
        # [..., C / (2 size), size, K]
        later = x.unflatten(-2, (-1, 2, size))[..., 1, :, :]
        earlier = k.unflatten(-2, (-1, 2, size))[..., 0, :, :]
        before, after = total.unflatten(-2, (-1, 2, size)).unbind(-3)
        border = before[..., -1:, :]
        below = (later * (after - border).exp()) @ (earlier * (border - before).exp()).transpose(-1, -2)
        first, second = products.unflatten(-3, (-1, 2)).unbind(-3)
        upper, lower = torch.cat([first, torch.zeros_like(below)], -1), torch.cat([below, second], -1)
        products = torch.cat([upper, lower], -2)
        size *= 2
    return products.squeeze(-3)


def _kimi_delta_rule_of_fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`kimi_delta_rule` computed by the kernels of flash-linear-attention."""
    from fla.ops.kda import chunk_kda

    return chunk_kda(q, k, v, g=log_decay, beta=rate, initial_state=state, output_final_state=True)
