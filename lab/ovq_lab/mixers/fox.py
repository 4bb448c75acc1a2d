"""Forgetting attention, the mixer of the Forgetting Transformer (Lin et al. 2025, arXiv 2503.02130): full
attention with a forget gate."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.layers.cache import LayerCache
from ovq.layers.common import without_autocast
from ovq.layers.constant import sum_dtype
from ovq.layers.gates import ForgetGate
from ovq.layers.heads import AttentionMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec, TensorMemory
from ovq.layers.softmax import FullAttention


class ForgettingAttention(FullAttention):
    """Full attention with a forget gate: later tokens add their log gates to the logit of token j.

    `logit_tj = scale q_t.k_j + sum_{j < i <= t} log f_i`, with the gate `log f` of
    `ovq.layers.gates.ForgetGate`, as in an OVQ layer with a forget gate: the two differ only in memory.

    Args:
        args: those of `AttentionMixer`.
        kwargs: those of `AttentionMixer`.

    Example:
        >>> layer = ForgettingAttention(32, num_heads=2)
        >>> _, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> cache.layers[0].state["log_forget"].shape
        torch.Size([1, 2, 20, 1])
    """

    config_fields = AttentionMixer.config_fields
    supports_logn = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.forget_gate = ForgetGate(self.qkv_proj.in_features, self.num_kv_heads)

    def mix(
        self,
        channels: Tensor,
        hidden_states: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
        **options: Any,
    ) -> Tensor:
        """See `Mixer.mix`."""
        q, k, v, scale = self.heads(channels, layout)
        log_forget = self.forget_gate(hidden_states)
        q = (q * scale[:, None]).transpose(1, 2)
        known = {"keys": k.to(v.dtype), "values": v, "log_forget": log_forget[..., None]}
        known = {name: x.transpose(1, 2) for name, x in known.items()}
        if cache is not None:
            past = cache.state or {name: x[:, :, :0] for name, x in known.items()}
            # Copies, on a first call too: views would keep the projections alive.
            known = {name: torch.cat([past[name], x], dim=2) for name, x in known.items()}
            cache.set_state(known, layout.num_new)
        wide = sum_dtype(v.dtype)
        with without_autocast(q):
            # Suffix sums are added to logits as one more component of the keys, which is 1 in every query.
            k = torch.cat([known["keys"].to(wide), later_sums(known["log_forget"])], dim=-1)
            # PyTorch's fast kernels need values of the same head size as keys.
            o = self.softmax_read(
                F.pad(q.to(wide), (0, 1), value=1.0), k, F.pad(known["values"].to(wide), (0, 1)), layout
            )
        return o[..., :-1].transpose(1, 2).to(v.dtype).flatten(2)

    @classmethod
    def memory_of(cls, settings: Any, *, rope_theta: float | None = None) -> TensorMemory:
        """See `Mixer.memory_of`."""
        return TensorMemory(
            kind="all keys and values, and how each token forgets", rope_theta=rope_theta, is_by_column=True
        )

    def memory_spec(self, num_tokens: int, dtype: torch.dtype) -> StateSpec:
        """See `Mixer.memory_spec`."""
        logs = ((self.num_kv_heads, num_tokens, 1), sum_dtype(dtype))
        return super().memory_spec(num_tokens, dtype) | {"log_forget": logs}


def later_sums(x: Tensor) -> Tensor:
    """Suffix sums of `x [B, H, T, 1]`: for each token, the sum over all later tokens.

    A softmax does not change when a constant is added to all logits of a query. So sums may run to the last
    token instead of to the query; they are then small, and therefore exact, near the newest tokens.

    Example:
        >>> later_sums(torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1)).flatten()
        tensor([6., 4., 0.])
    """
    behind = F.pad(x[:, :, 1:], (0, 0, 0, 1))
    return behind.flip(2).cumsum(2, dtype=torch.float64).flip(2).to(x.dtype)
