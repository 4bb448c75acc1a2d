"""Base class of mixers with a delta rule: a matrix per head that every token corrects towards its value."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.layers.cache import LayerCache
from ovq.layers.common import l2_normalize
from ovq.layers.constant import ConstantStateMixer, sum_dtype, without_autocast
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From queries, keys, values, logarithms of decays, rates and a state to outputs and the state after them."""


class DeltaRuleMixer(ConstantStateMixer):
    """Queries, keys and values for a delta rule with decay, and the matrix of each head between calls.

    A subclass says how tokens decay the matrix (`gates`), by what rule (`rule`) and what becomes of the
    output (`gated`).

    Args:
        hidden_size: width of the model.
        num_heads: heads H of values and states.
        num_kv_heads: heads Hkv of queries and keys; divides H.
        head_dim: K.
        value_dim: V.
        kwargs: `conv_size` and `layer_idx` of `Mixer`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        **kwargs: Any,
    ):
        super().__init__(
            hidden_size,
            num_channels=2 * num_kv_heads * head_dim + num_heads * value_dim,
            num_outputs=num_heads * value_dim,
            **kwargs,
        )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.value_dim = head_dim, value_dim

    @abstractmethod
    def gates(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is computed from each token `[B, T, D]` besides queries, keys and values.

        Returns:
            What `gated` is to take, the logarithms of the decays (`[B, T, H]` or `[B, T, H, K]`, at most 0,
            float32 or better) and the rates `[B, T, H]` before their sigmoid.
        """

    @abstractmethod
    def rule(self, like: Tensor) -> Rule:
        """The rule for tensors like this: kernels for a GPU where they are installed, or code of our own."""

    @abstractmethod
    def gated(self, outputs: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """The outputs of the rule `[B, T, H, V]`, normalised and gated: `[B, T, H * V]` in `dtype`."""

    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """The state matrix of each head."""
        return {"delta": ((self.num_heads, self.head_dim, self.value_dim), sum_dtype(dtype))}

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
        num_key_channels = self.num_kv_heads * self.head_dim
        q, k, v = F.silu(channels).split(
            [num_key_channels, num_key_channels, self.num_heads * self.value_dim], dim=-1
        )
        q, k = (l2_normalize(x.unflatten(-1, (-1, self.head_dim))) for x in (q, k))
        gate, log_decay, rate = self.gates(hidden_states)
        inputs = (q, k, v.unflatten(-1, (self.num_heads, -1)), log_decay, rate.to(log_decay.dtype).sigmoid())
        # Zeros where there is no token, so that the state neither decays nor is written to.
        q, k, v, log_decay, rate = (rows.take(x) for x in inputs)
        before = self.state_before(cache, len(q), channels)
        with without_autocast(q):
            o, delta = self.rule(q)(q, k, v.to(q.dtype), log_decay, rate, before["delta"])
        if cache is not None:
            cache.set_state({"delta": delta}, layout.num_new)
        return self.gated(rows.put(o), gate, channels.dtype)
