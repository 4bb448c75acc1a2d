"""Learned gates: weights of tokens when they are merged, forgetting, and the outputs of attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.layers.common import OwnWeights, RMSNorm, without_autocast
from ovq.layers.products import Linear

#: Number of tokens in which the fastest and the slowest head forget a factor of e at initialisation.
FORGET_TOKENS = (4, 4096)


class MergeGate(OwnWeights):
    """Weight of each token in the dictionary, per key/value head: 1 + elu(W x), which is above 0.

    W is initially zero, so that every weight is 1. As in KVM (arXiv 2605.09877, see `docs/method/mixers.md`),
    the gate is a function of the input of the layer.

    Example:
        >>> MergeGate(8, num_kv_heads=2)(torch.randn(1, 3, 8)).unique()
        tensor([1.], grad_fn=<Unique2Backward0>)
    """

    def __init__(self, hidden_size: int, num_kv_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_kv_heads, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set W to 0, so that every weight is 1."""
        nn.init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Weights `[B, T, Hkv]` for inputs `[B, T, hidden_size]`, in float32 (float64 for float64 inputs).

        They are finite: 1 where inputs are not, as the op takes no others, and such a token would fail all.
        """
        weights = 1 + F.elu(_product(hidden_states, self.weight))
        return torch.where(weights.isfinite(), weights, 1)


class ForgetGate(OwnWeights):
    """Log forget gate of each token, per key/value head: log sigmoid(W x + b).

    W is initially zero, and b such that heads forget a factor of e in 4 to 4,096 tokens, evenly spaced in
    logs; a single head in 4,096. The gate is from the Forgetting Transformer (arXiv 2503.02130); the
    initialisation is this project's choice.
    """

    def __init__(self, hidden_size: int, num_kv_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_kv_heads, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_kv_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set W to 0 and b to the initial rate of forgetting of each head."""
        nn.init.zeros_(self.weight)
        num, (start, end) = len(self.bias), map(math.log10, FORGET_TOKENS)
        with torch.no_grad():
            # From the bias itself, as a sharded one (DTensor) takes no numbers of plain tensors.
            to_slowest = num - torch.ones_like(self.bias, dtype=torch.float64).cumsum(0)
            tokens = 10 ** (end - to_slowest * (end - start) / max(1, num - 1))
            # log sigmoid(b) = -1 / tokens. A single head gets the slowest rate.
            self.bias.copy_(-torch.expm1(1 / tokens).log())

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Log forget gates `[B, T, Hkv]`, at most 0, in float32 (float64 for float64 inputs); 0 for NaN."""
        logs = F.logsigmoid(_product(hidden_states, self.weight, self.bias))
        return torch.where(logs.isnan(), 0, logs)


class OutputGate(nn.Module):
    """Outputs of attention, normalised per head and multiplied by silu(W x) of the layer's input x.

    Layers of Gated DeltaNet (arXiv 2412.06464) have it by definition.

    Args:
        hidden_size: width D of the input.
        num_heads: heads H of the outputs.
        value_dim: components V of a head.
    """

    def __init__(self, hidden_size: int, num_heads: int, value_dim: int):
        super().__init__()
        self.proj = Linear(hidden_size, num_heads * value_dim)
        self.norm = RMSNorm(value_dim, eps=1e-6)

    def forward(self, o: Tensor, hidden_states: Tensor) -> Tensor:
        """Gated outputs `[B, T, H V]` for outputs `o` `[B, T, H V]` and inputs `[B, T, hidden_size]`."""
        weight = self.norm.weight
        # Under autocast the weight may be float32, which PyTorch's norm does not take beside bfloat16.
        heads = self.norm(o.unflatten(-1, (-1, len(weight))).to(weight.dtype))
        return heads.flatten(2).to(o.dtype) * F.silu(self.proj(hidden_states))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`W x + b` in at least float32, also under autocast."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x):
        return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
