"""Causal linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), in chunks, with constant memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.layers.cache import LayerCache
from ovq.layers.common import without_autocast
from ovq.layers.constant import ConstantStateMixer, sum_dtype
from ovq.layers.heads import AttentionMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec

# Tokens per chunk, within which all pairs are multiplied: larger chunks mean fewer sums but more pairs. It
# changes the result by rounding only.
CHUNK = 64


class LinearAttention(ConstantStateMixer, AttentionMixer):
    """Attention with the kernel `phi(q).phi(k)` in place of `exp(scale q.k)`, whose state is a sum.

    `o_t = sum_{j<=t} phi(q_t).phi(k_j) v_j / sum_{j<=t} phi(q_t).phi(k_j)`, with
    `phi(x) = softmax(scale x)` over the K components of the normalised query or key: positive features, which
    are sharp where the learned scale is large. The state is the sum of `phi(k) [v, 1]`: K (V + 1) numbers per
    head.

    The arguments are those of `AttentionMixer`.

    Example:
        >>> layer = LinearAttention(32, num_heads=2)
        >>> _, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> cache.layers[0].state["kv_sum"].shape
        torch.Size([1, 2, 16, 17])
    """

    state_kind = "the sums of linear attention"
    supports_logn = False

    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """The sum of `phi(k) [v, 1]` of each key/value head."""
        return {"kv_sum": ((self.num_kv_heads, self.head_dim, self.head_dim + 1), sum_dtype(dtype))}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
    ) -> Tensor:
        """See `AttentionMixer.attend`."""
        rows = layout.rows()
        scale = scale[:, None]
        # The scale of a key/value head is the mean of those of its query heads.
        q, k = (x.softmax(-1) for x in (q * scale, k * scale.view(self.num_kv_heads, -1, 1).mean(1)))
        q, k, wide_v = rows.take(q), rows.take(k), rows.take(v).to(k.dtype)
        before = self.state_before(cache, q.shape[0], v)
        with without_autocast(q):
            o, kv_sum = linear_attention(q, k, wide_v, before["kv_sum"])
        if cache is not None:
            # A copy, because the view would keep the sums of all chunks alive.
            cache.set_state({"kv_sum": kv_sum.clone()}, layout.num_new)
        return rows.put(o).to(v.dtype)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, kv_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised causal linear attention over features, chunk by chunk.

    Args:
        q: `[B, T, H, K]` features of the queries, not negative.
        k: `[B, T, Hkv, K]` features of the keys; zero at positions without a token.
        v: `[B, T, Hkv, V]`.
        kv_sum: `[B, Hkv, K, V + 1]`, the sum of `k [v, 1]` over earlier tokens.

    Returns:
        `[B, T, H, V]`, and the sum including these tokens.
    """
    num_tokens, num_heads = q.shape[1:3]
    num_kv_heads = k.shape[2]
    chunk = min(CHUNK, num_tokens)
    fill = -num_tokens % chunk
    v = torch.cat([v, v.new_ones(()).expand(*v.shape[:3], 1)], dim=-1)

    def chunks(x: Tensor) -> Tensor:
        """`[B, T, h, D]` to `[B, Hkv, n, h/Hkv * chunk, D]`."""
        x = F.pad(x, (0, 0, 0, 0, 0, fill)).unflatten(1, (-1, chunk)).unflatten(3, (num_kv_heads, -1))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(3, 4)

    q, k, v = chunks(q), chunks(k), chunks(v)
    sums = k.transpose(-1, -2) @ v
    # Sums before each chunk and after the last.
    sums = torch.cat([kv_sum.to(sums.dtype)[:, :, None], sums], dim=2).cumsum(2)
    is_earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    weights = (q @ k.transpose(-1, -2)).masked_fill(~is_earlier.repeat(num_heads // num_kv_heads, 1), 0)
    o = weights @ v + q @ sums[:, :, :-1]
    # The total weight is zero only in a row without tokens.
    o = o[..., :-1] / o[..., -1:].clamp(min=torch.finfo(o.dtype).tiny)
    o = o.unflatten(3, (-1, chunk)).permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)
    return o[:, :num_tokens], sums[:, :, -1]
