"""What an OVQ layer may learn about its memory: what tokens count in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MergeGate(nn.Module):
    """The weight with which each token enters the dictionary, per key/value head: 1 + elu(W x), above 0.

    W starts at zero, so that every token counts 1 at first. As in KVM (arXiv 2605.09877, see
    `docs/mixers.md`), the gate is a function of the input of the layer.

    Args:
        hidden_size: width of the model.
        num_kv_heads: key/value heads Hkv.

    Example:
        >>> MergeGate(8, num_kv_heads=2)(torch.randn(1, 3, 8)).unique()
        tensor([1.], grad_fn=<Unique2Backward0>)
    """

    def __init__(self, hidden_size: int, num_kv_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_kv_heads, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let every token count 1."""
        nn.init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Weights `[B, T, Hkv]` of tokens `[B, T, hidden_size]`, in float32 (float64 for float64 inputs)."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return 1 + F.elu(F.linear(hidden_states.to(wide), self.weight.to(wide)))
