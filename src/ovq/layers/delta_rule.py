"""Base class of delta-rule mixers: a state matrix per head that every token corrects towards its value."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.layers.cache import LayerCache
from ovq.layers.common import l2_normalize, without_autocast
from ovq.layers.constant import ConstantStateMixer, sum_dtype
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps queries, keys, values, log decays, rates and a state to outputs and the final state."""


class DeltaRuleMixer(ConstantStateMixer):
    """Mixer with queries, keys and values for a delta rule with decay, and a cached state matrix per head.

    A subclass defines decays and rates (`gates`), the rule (`rule`) and the output gate (`gated`). Values and
    states have `num_heads` heads H; queries and keys have `num_kv_heads`, a divisor of H.
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
        """Output gates, log decays and rates for inputs `[B, T, D]`.

        Returns:
            The argument `gate` of `gated`, the log decays (`[B, T, H]` or `[B, T, H, K]`, at most 0, at least
            float32) and the rates `[B, T, H]` before the sigmoid.
        """

    @abstractmethod
    def rule(self, like: Tensor) -> Rule:
        """The implementation for tensors like this: installed GPU kernels, else this package's code."""

    @abstractmethod
    def gated(self, outputs: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalise and gate the outputs `[B, T, H, V]` of the rule: `[B, T, H * V]` in `dtype`."""

    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """Specification of the state matrix of each head."""
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
        # Zeros at padding, so that the state neither decays nor is written to.
        q, k, v, log_decay, rate = (rows.take(x) for x in inputs)
        before = self.state_before(cache, q.shape[0], channels)
        with without_autocast(q):
            o, delta = self.rule(q)(q, k, v.to(q.dtype), log_decay, rate, before["delta"])
        if cache is not None:
            cache.set_state({"delta": delta}, layout.num_new)
        return self.gated(rows.put(o), gate, channels.dtype)
