"""Parts of recurrences with decay that are computed chunk by chunk: Gated DeltaNet and Mamba2."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.layers.constant import sum_dtype


class DecayRates(nn.Module):
    """Step sizes and decays per head, as in Mamba2 and Gated DeltaNet.

    `step = softplus(x + dt_bias)`, `log decay = -exp(A_log) step`.

    Args:
        num_heads: H.

    Example:
        >>> step, log_decay = DecayRates(3)(torch.zeros(1, 5, 3))
        >>> bool((step > 0).all() and (log_decay < 0).all())
        True
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw rates from 1 to 16 and steps from 0.001 to 0.1, both uniformly on a logarithmic scale.

        For steps this small, the inverse of softplus is nearly the logarithm.
        """
        nn.init.uniform_(self.A_log, 0.0, math.log(16))
        nn.init.uniform_(self.dt_bias, math.log(0.001), math.log(0.1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., H]` to steps and logarithms of decays, `[..., H]` each, in float32 (float64 for float64)."""
        wide = sum_dtype(x.dtype)
        step = F.softplus(x.to(wide) + self.dt_bias.to(wide))
        return step, -self.A_log.to(wide).exp() * step


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, T, H, ...]` to `[B, H, n, chunk, ...]`, padded with zeros."""
    fill = -x.shape[1] % chunk
    if fill:
        x = torch.cat([x, x.new_zeros(x.shape[0], fill, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, chunk)).movedim(3, 1)


def from_chunks(x: Tensor, num_tokens: int) -> Tensor:
    """`[B, H, n, chunk, D]` back to `[B, T, H, D]`."""
    return x.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2)


def decay_between(total: Tensor) -> Tensor:
    """The share of what token j <= i of a chunk put in that is left at token i; 0 for later tokens.

    Args:
        total: `[..., C]` sums of the logarithms of the decays up to each token of the chunk.

    Returns:
        `[..., C, C]`, row i, column j: `exp(total_i - total_j)`.
    """
    size = total.shape[-1]
    is_later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    # Masked before the exponential, which could overflow there.
    return (total[..., :, None] - total[..., None, :]).masked_fill(is_later, -torch.inf).exp()
