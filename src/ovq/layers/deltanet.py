"""Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464): the delta rule with decay."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.fields import ConfigField
from ovq.layers.base import Mixer
from ovq.layers.chunked import (
    DecayRates,
    can_use_fla,
    decay_between,
    delta_rule_in_chunks,
    from_chunks,
    to_chunks,
)
from ovq.layers.delta_rule import DeltaRuleMixer, Rule
from ovq.layers.sizes import checked_head_dim, num_projected
from ovq.ops.options import check_sizes

# Tokens per triangular system. A tiling choice: faster on a CPU than 64, the usual size on a GPU.
CHUNK = 32


class GatedDeltaNet(DeltaRuleMixer):
    """A state matrix per head that decays and that every token corrects towards `S^T k = v`.

    `S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T`, `o_t = S_t^T q_t / sqrt(K)`, with decay `a_t` and
    rate `b_t` in (0, 1) computed from the token. Queries and keys have `num_kv_heads` heads, values
    `num_heads`; the output is normalised per head and gated. By default queries and keys are three quarters
    as wide as the model, and values are twice as wide as keys, as in the paper.

    Args:
        hidden_size: width of the model.
        num_heads: heads H of values and states.
        num_kv_heads: heads Hkv of queries and keys; divides H. None: `num_heads`.
        head_dim: K. None: three quarters of `hidden_size / num_heads`.
        value_dim: V. None: `2 K`.
        kwargs: `conv_size` and `layer_idx` of `Mixer`.

    Raises:
        ValueError: if sizes are inconsistent.

    Example:
        >>> layer = GatedDeltaNet(32, num_heads=2)
        >>> _, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> cache.layers[0].state["delta"].shape
        torch.Size([1, 2, 12, 24])
    """

    state_kind = "the matrices of Gated DeltaNet"
    config_fields = Mixer.config_fields | {
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": ConfigField(
            int | None, None, "components of a key; None: `head_dim`", name="delta_head_dim", at_least=1
        ),
        "value_dim": ConfigField(
            int | None, None, "components of a value; None: twice as many", name="delta_value_dim", at_least=1
        ),
    }

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        value_dim: int | None = None,
        **kwargs: Any,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        share = checked_head_dim(hidden_size, num_heads, num_kv_heads, head_dim)
        head_dim = max(1, 3 * share // 4) if head_dim is None else head_dim
        value_dim = 2 * head_dim if value_dim is None else value_dim
        check_sizes(1, value_dim=value_dim)
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, value_dim, **kwargs)
        # Projects to the output gate, the decay and the rate.
        self.gate_proj = nn.Linear(hidden_size, num_heads * (value_dim + 2), bias=False)
        self.rates = DecayRates(num_heads)
        self.out_norm = nn.RMSNorm(value_dim, eps=1e-6)

    @classmethod
    def arguments_of(cls, config: Any) -> dict[str, Any]:
        """See `Mixer.arguments_of`."""
        arguments = super().arguments_of(config)
        return arguments | {"head_dim": arguments["head_dim"] or config.head_dim}

    @classmethod
    def equal_sizes(cls, config: Any) -> dict[str, int]:
        """Head sizes for equally many parameters: values twice as wide as keys, or keys of a given width."""
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        num_left = num_projected(config) // 2 - num_heads
        head_dim = config.delta_head_dim
        if head_dim is None:
            head_dim = max(1, round(num_left / (3 * num_heads + num_kv_heads)))
            return {"delta_head_dim": head_dim, "delta_value_dim": 2 * head_dim}
        value_dim = max(1, round(2 * (num_left - num_kv_heads * head_dim) / (3 * num_heads)))
        return {"delta_head_dim": head_dim, "delta_value_dim": value_dim}

    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `DeltaRuleMixer.gates`."""
        gate, decay, rate = self.gate_proj(hidden_states).split(
            [self.num_heads * self.value_dim, self.num_heads, self.num_heads], dim=-1
        )
        return gate, self.rates(decay)[1], rate

    def rule(self, like: Tensor) -> Rule:
        """See `DeltaRuleMixer.rule`."""
        return _gated_delta_rule_of_fla if can_use_fla(like) else gated_delta_rule

    def gated(self, outputs: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """See `DeltaRuleMixer.gated`."""
        outputs = self.out_norm(outputs.to(self.out_norm.weight.dtype))
        return outputs.flatten(2).to(dtype) * F.silu(gate)


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The gated delta rule in chunks.

    Args:
        q: `[B, T, Hk, K]`, normalised; this function scales it by `1 / sqrt(K)`. Hk divides H.
        k: `[B, T, Hk, K]`, normalised.
        v: `[B, T, H, V]`.
        log_decay: `[B, T, H]`, at most 0.
        rate: `[B, T, H]`, in [0, 1].
        state: `[B, H, K, V]`.

    Returns:
        `[B, T, H, V]`, and the state after the last token.
    """
    num_tokens, num_heads = v.shape[1:3]
    q, k = (x.repeat_interleave(num_heads // x.shape[2], dim=2) for x in (q * q.shape[-1] ** -0.5, k))
    chunk = min(CHUNK, num_tokens)
    q, k, v, log_decay, rate = (to_chunks(x, chunk) for x in (q, k, v, log_decay, rate))
    total = log_decay.cumsum(-1)
    between, since_start = decay_between(total), total.exp()[..., None]
    to_end = (total[..., -1:] - total).exp()[..., None]
    o, state = delta_rule_in_chunks(
        v,
        rate,
        state,
        q_since_start=q * since_start,
        k_since_start=k * since_start,
        k_to_end=k * to_end,
        query_products=q @ k.transpose(-1, -2) * between,
        key_products=k @ k.transpose(-1, -2) * between,
        kept=since_start[..., -1:, :],
    )
    return from_chunks(o, num_tokens), state


def _gated_delta_rule_of_fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, rate: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_delta_rule` by flash-linear-attention's kernels."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], dim=2) for x in (q, k))
    return chunk_gated_delta_rule(
        q, k, v, g=log_decay, beta=rate, initial_state=state, output_final_state=True
    )
