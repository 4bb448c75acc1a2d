"""Raven (github.com/goombalab/raven): a router writes each token to a few of M slots; only these decay."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.fields import ConfigField
from ovq.layers.cache import LayerCache
from ovq.layers.chunked import DecayRates, decayed_sums, from_chunks, to_chunks
from ovq.layers.common import without_autocast
from ovq.layers.constant import ConstantStateMixer, sum_dtype
from ovq.layers.heads import HeadsMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec
from ovq.layers.sizes import checked_head_dim, num_projected
from ovq_lab.mixers.norms import WideRMSNorm

NOISE = True

# Tokens per chunk, within which the decays of all pairs are formed, for the slots of the earlier token. It
# changes the result by rounding only.
CHUNK = 16


class RavenAttention(ConstantStateMixer, HeadsMixer):
    """Softmax attention over M slots; each token decays, and writes to, the few slots that a router selects.

    With the router's weights `r_t` (sigmoids of the `raven_top_k` largest of M logits, divided by their sum;
    zero for all other slots) and the decay `a_t < 0` of a head, slot m changes by
    `S[m] = e_t[m] S[m] + (1 - e_t[m]) [k_t, v_t]` with `e_t[m] = exp(a_t r_t[m])`, and
    `o_t = sum_m softmax_m(q_t.S_k[m]) S_v[m]`. A slot that is not selected stays as it is.

    Args:
        hidden_size: width of the model.
        num_heads: query heads H, each with slots of its own.
        num_kv_heads: as in `HeadsMixer`.
        head_dim: likewise.
        raven_head_dim: K, if it is to differ from `head_dim`.
        raven_slots: M. None: `head_dim`.
        raven_top_k: slots that a token is written to. None: one in eight.
        raven_noise: whether Gumbel noise is added to the router's logits in training.
        kwargs: `conv_size` and `layer_idx` of `Mixer`.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> layer = RavenAttention(32, num_heads=2, raven_slots=24, raven_top_k=3)
        >>> _, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> cache.layers[0].state["slot_keys"].shape
        torch.Size([1, 2, 24, 16])
    """

    state_kind = "the slots of Raven"
    config_fields = HeadsMixer.config_fields | {
        "raven_head_dim": ConfigField(int | None, None, "size of a head; None: `head_dim`", at_least=1),
        "raven_slots": ConfigField(int | None, None, "slots per head; None: as many as `head_dim`"),
        "raven_top_k": ConfigField(int | None, None, "slots that a token is written to; None: one in eight"),
        "raven_noise": ConfigField(bool, NOISE, "whether the router adds Gumbel noise in training"),
    }

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        raven_head_dim: int | None = None,
        raven_slots: int | None = None,
        raven_top_k: int | None = None,
        raven_noise: bool = NOISE,
        **kwargs: Any,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = checked_head_dim(hidden_size, num_heads, num_kv_heads, head_dim)
        num_slots, top_k = checked_slots(head_dim, raven_slots, raven_top_k)
        head_dim = head_dim if raven_head_dim is None else raven_head_dim
        if head_dim < 1:
            raise ValueError(f"raven_head_dim: expected at least 1, found {head_dim}")
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, **kwargs)
        self.num_slots, self.top_k, self.raven_noise = num_slots, top_k, raven_noise
        # Projects to the logits of the router and the decay of each head.
        self.router_proj = nn.Linear(hidden_size, num_heads * (num_slots + 1), bias=False)
        # The authors' range. Slots then take in twice as much of a token as with the range of Mamba2.
        self.rates = DecayRates(num_heads, rate_range=(0.0, 16.0))
        self.q_norm, self.k_norm = (WideRMSNorm(head_dim, eps=1e-5) for _ in range(2))
        self.out_norm = WideRMSNorm(num_heads * head_dim, eps=1e-5)

    @classmethod
    def check_config(cls, config: Any) -> None:
        """See `Mixer.check_config`."""
        checked_slots(config.head_dim, config.raven_slots, config.raven_top_k)

    @classmethod
    def equal_sizes(cls, config: Any) -> dict[str, int]:
        """Head size for as many parameters: the other projections shrink by the size of the router."""
        num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        num_slots, _ = checked_slots(config.head_dim, config.raven_slots, config.raven_top_k)
        num_left = num_projected(config) - num_heads * (num_slots + 1)
        return {"raven_head_dim": max(1, num_left // (2 * (num_heads + num_kv_heads)))}

    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """Keys and values of the slots of each head."""
        slots = ((self.num_heads, self.num_slots, self.head_dim), sum_dtype(dtype))
        return {"slot_keys": slots, "slot_values": slots}

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
        q, k, v = self.split_heads(F.silu(channels))
        q, k = self.q_norm(q), self.k_norm(k)
        logits, decay = self.router_proj(hidden_states).split(
            [self.num_heads * self.num_slots, self.num_heads], dim=-1
        )
        _, log_decay = self.rates(decay)
        slots, weights = self._route(logits.unflatten(-1, (self.num_heads, -1)).to(log_decay.dtype))
        # Positions without a token are zeros: no slot decays or is written to.
        inputs = (q, k, v.to(q.dtype), slots, log_decay[..., None] * weights)
        q, k, wide_v, slots, log_decay = (rows.take(x) for x in inputs)
        before = self.state_before(cache, q.shape[0], v)
        with without_autocast(q):
            o, keys, values = routed_slots(
                q, k, wide_v, slots, log_decay, keys=before["slot_keys"], values=before["slot_values"]
            )
        if cache is not None:
            cache.set_state({"slot_keys": keys, "slot_values": values}, layout.num_new)
        return self.out_norm(F.silu(rows.put(o)).flatten(2)).to(channels.dtype)

    def _route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The k slots `[B, T, H, k]` with the largest of the logits `[B, T, H, M]`, and their weights."""
        if self.training and self.raven_noise:
            logits = logits - torch.empty_like(logits).exponential_().log()
        # A stable sort takes the first slots where logits tie; for `topk` the order of ties is undefined.
        slots = logits.argsort(dim=-1, descending=True, stable=True)[..., : self.top_k]
        chosen = logits.gather(-1, slots).sigmoid()
        return slots, chosen / (chosen.sum(-1, keepdim=True) + 1e-9)


def routed_slots(
    q: Tensor, k: Tensor, v: Tensor, slots: Tensor, log_decay: Tensor, *, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Decay slots by `e = exp(log_decay)`, add `1 - e` of each token, and read by softmax; in chunks.

    Args:
        q: `[B, T, H, K]`.
        k: `[B, T, Hkv, K]`.
        v: `[B, T, Hkv, V]`.
        slots: `[B, T, H, k]` int64, the slots that a token changes.
        log_decay: `[B, T, H, k]`, at most 0; 0 where a token leaves a slot as it is.
        keys: `[B, H, M, K]`, the slots before.
        values: `[B, H, M, V]`, likewise.

    Returns:
        `[B, T, H, V]`, and keys and values of the slots after the last token.
    """
    num_tokens, num_heads = q.shape[1:3]
    chunk = min(CHUNK, num_tokens)
    k, v = (x.repeat_interleave(num_heads // x.shape[2], dim=2) for x in (k, v))
    # [B, H, n, C, *] from here on.
    q, k, v, slots, log_decay = (to_chunks(x, chunk) for x in (q, k, v, slots, log_decay))
    of_slots = log_decay.new_zeros(*slots.shape[:-1], keys.shape[2]).scatter_add(-1, slots, log_decay)
    total = of_slots.cumsum(-2)
    # Share of each token that each slot holds at the end of the chunk.
    left = (total[..., -1:, :] - total).exp() * -torch.expm1(of_slots)
    added = left.transpose(-1, -2) @ torch.cat([k, v], dim=-1)
    kept = total[..., -1, :, None].exp()
    before, state = decayed_sums(torch.cat([keys, values], dim=-1), kept, added)
    sizes = [keys.shape[-1], values.shape[-1]]
    old_keys, old_values = before.split(sizes, dim=-1)
    top_k = slots.shape[-1]
    # [B, H, n, C, C k] from here on: for each token t, the k writes of each token j of the chunk.
    index = slots.flatten(-2)[..., None, :].expand(*slots.shape[:-1], -1)
    since = total.gather(-1, index) - total.gather(-1, slots).flatten(-2)[..., None, :]
    is_later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    # As t is not before j, no exponent is above 0.
    left = since.masked_fill(is_later.repeat_interleave(top_k, dim=-1), -torch.inf).exp()
    left = left * -torch.expm1(log_decay).flatten(-2)[..., None, :]
    products = (q @ k.transpose(-1, -2)).repeat_interleave(top_k, dim=-1)
    scores = (total.exp() * (q @ old_keys.transpose(-1, -2))).scatter_add(-1, index, left * products)
    weights = scores.softmax(-1)
    of_tokens = (left * weights.gather(-1, index)).unflatten(-1, (chunk, top_k)).sum(-1)
    o = (weights * total.exp()) @ old_values + of_tokens @ v
    # Copies, because views would keep each other alive.
    keys, values = (x.clone() for x in state.split(sizes, dim=-1))
    return from_chunks(o, num_tokens), keys, values


def checked_slots(head_dim: int, num_slots: int | None, top_k: int | None) -> tuple[int, int]:
    """Number of slots, and number of slots per token. Raises ValueError for impossible numbers.

    Example:
        >>> checked_slots(64, 256, None), checked_slots(64, None, 5)
        ((256, 32), (64, 5))
    """
    num_slots = head_dim if num_slots is None else num_slots
    top_k = max(1, num_slots // 8) if top_k is None else top_k
    if not 1 <= top_k <= num_slots:
        raise ValueError(
            f"expected 1 <= raven_top_k <= raven_slots, found raven_top_k={top_k}, raven_slots={num_slots}"
        )
    return num_slots, top_k
