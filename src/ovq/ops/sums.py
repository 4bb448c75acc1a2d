"""Helpers for slot sums: dtypes, means, masses and their logs."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.options import LEAST_READ

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Supported dtypes of queries, keys and values."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and routing for inputs of `dtype`: float64 for float64, else float32.

    Lower precision would change what the model remembers: routing is a hard argmax, and a running mean in
    bfloat16 stops moving after a few hundred tokens.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def slot_means(sums: Tensor, mass: Tensor) -> Tensor:
    """Slot means `[..., M, D]`: sums `[..., M, D]` over counts or weights `[..., M]`; 0 for spare slots."""
    return sums / divisor(mass, sums.dtype).unsqueeze(-1)


def without_trace(x: Tensor, weights: Tensor) -> Tensor:
    """Keys or values `[..., D]` with the non-finite entries of tokens of weight 0 set to 0.

    Tokens of weight 0 must leave no trace in the sums, but 0 times NaN would be NaN.

    Example:
        >>> without_trace(torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]]), torch.tensor([0.0, 1.0]))
        tensor([[1., 0.],
                [inf, 2.]])
    """
    return x.masked_fill((weights == 0).unsqueeze(-1) & ~x.isfinite(), 0)


def divisor(mass: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts or weights to divide by; 1 where they are 0, as the sums there are zero."""
    if not mass.is_floating_point():
        return mass.clamp(min=1).to(dtype)
    return torch.where(mass > 0, mass, 1).to(dtype)


def log_mass(mass: Tensor, dtype: torch.dtype) -> Tensor:
    """Log of counts or weights; -inf, with gradient 0, where they are 0."""
    if not mass.is_floating_point():
        return mass.to(dtype).log()
    return divisor(mass, dtype).log().masked_fill(mass <= 0, -torch.inf)


def log_token_weights(weights: Tensor) -> Tensor:
    """Score biases of the tokens of the own chunk if they are read with their weights: log weights."""
    return weights.clamp(min=LEAST_READ).log()


def added_up(items: Tensor, slots: Tensor, num_slots: int) -> Tensor:
    """Sums of the items of each slot.

    Args:
        items: `[..., M]` or `[..., M, D]`.
        slots: `[..., M]` slot of each item.
        num_slots: N.

    Returns:
        `[..., N]` or `[..., N, D]`.

    Example:
        >>> added_up(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 0]), 3)
        tensor([4., 0., 2.])
    """
    dim = slots.dim() - 1
    index = slots if items.dim() == slots.dim() else slots[..., None].expand_as(items)
    total = items.new_zeros(*items.shape[:dim], num_slots, *items.shape[dim + 1 :])
    return total.scatter_add(dim, index, items)
