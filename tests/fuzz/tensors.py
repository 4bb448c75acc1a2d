"""Tokens, and the ways they may lie in memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

#: Ways a tensor `[B, T, H, D]` may lie in memory; "heads" and "rows" share that of equal heads or rows.
ORDERS = ("plain", "heads first", "time last", "heads last", "sliced", "spread", "fused", "heads", "rows")

#: Weights of tokens, from normal numbers.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": lambda x: 0.1 + x.abs(),
    "some zero": lambda x: x.clamp(min=0),
    "tiny": lambda x: x.abs().clamp(max=1) ** 9,
    "one": torch.ones_like,
}
#: Logs that tokens forget, likewise.
LOGS: dict[str, Callable[[Tensor], Tensor]] = {
    "little": lambda x: -0.02 * x.abs(),
    "some": lambda x: x.clamp(max=0),
    "much": lambda x: -10 * x.abs(),
    "nothing": torch.zeros_like,
}
#: A scale so large that scores divided by the least weight that is read exceed float32. Twice as much is
#: less than its log: a token of weight 0 is not seen, unless others have faded.
SHARP = 36.0
#: What `LOGS` it goes with.
SHARP_LOGS = ("none", "nothing", "little")


def numbers(seed: int, *names: object, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers in float64 that depend on the seed and the names alone."""
    # crc32, since Python's own hash of a string changes from process to process.
    generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, *names)).encode()))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def normalized(x: Tensor) -> Tensor:
    """Vectors of unit length."""
    return normalize(x, dim=-1)


def stored(x: Tensor, order: str) -> Tensor:
    """`x` `[B, T, H, D]`, the same numbers lying in memory in another order; differentiable.

    Example:
        >>> x = torch.arange(24.0).view(1, 2, 3, 4)
        >>> stored(x, "time last").stride(), torch.equal(stored(x, "fused"), x)
        ((24, 1, 8, 2), True)
    """
    permutations = {"heads first": (0, 2, 1, 3), "time last": (0, 2, 3, 1), "heads last": (1, 0, 3, 2)}
    if order in permutations:
        axes = permutations[order]
        inverse = [axes.index(i) for i in range(4)]
        return x.permute(axes).contiguous().permute(inverse)
    if order == "sliced":  # every other number of a vector
        return torch.stack((x, 7 - x), -1).flatten(3)[..., ::2]
    if order == "spread":  # every other token, from the second on
        return torch.stack((7 - x, x), 2).flatten(1, 2)[:, 1::2]
    if order == "fused":  # a part of the product that gives q, k and v at once
        flat = x.flatten(2)
        return torch.cat((7 - flat, flat, flat), -1)[..., flat.shape[2] : 2 * flat.shape[2]].view(x.shape)
    if order == "heads":
        return x[:, :, :1].expand(x.shape)
    if order == "rows":
        return x[:1].expand(x.shape)
    return x.contiguous()
