"""`ExpectedUse`: how much a token will be asked for, by its key and value, learned without training.

A slot that several tokens share gives queries their mean. For most tokens that does not matter, since nobody
asks for them again; it does for a few, such as the digits of a number. If a head lost token i, its outputs
would change by about p_ti (v_i - o_t), and the loss would rise by half the mean over the queries t of

    (p_ti g_t . (v_i - o_t))^2,

with the probabilities p, the outputs o and the gradients g of the loss with respect to these. The root of
that is the use of a token. What use is to be expected of a token that has just been read is taken to be the
exponential of a linear function of its key and value, fitted by Poisson regression [ours]. These are the
weights with which tokens are merged: where costs count tokens, they count their weights, so that tokens of no
use are merged first, and means are weighted. The softmax goes on counting tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ovq.convert.reach import Reach

# Weights are from 2 to the power of minus this to 2 to the power of this (`MOST_USE` of memory.h).
MOST_USE = 8
# What keeps the numbers of the function small, where each number of a key or value has a variance of 1, and
# the mean use is 1.
_RIDGE = 0.01
# Steps of Newton's method at most, and the gain of a step after which there is no further one.
_STEPS = 12
_LEAST_GAIN = 1e-4
# Digits that are saved, so that a config stays short.
_DIGITS = 4


def token_weights(keys: Tensor, values: Tensor, use: Tensor) -> Tensor:
    """Weights `[..., h, T]` of tokens, in float64.

    They are powers of 2, so that it does not depend on the order of sums whether two computations agree.

    Args:
        keys: `[..., h, T, K]`, as the memory holds them. values: `[..., h, T, V]`.
        use: `[..., h, K + V + 1]` numbers of the linear function that gives the logarithm to base 2, its
            constant last.

    Example:
        >>> keys, values = torch.tensor([[[2.0], [-1.0]]]), torch.zeros(1, 2, 1)
        >>> token_weights(keys, values, torch.tensor([[1.0, 0.0, 0.6]]))
        tensor([[8., 1.]], dtype=torch.float64)
    """
    numbers = use.double()
    tokens = torch.cat([keys.detach(), values.detach()], -1).double()
    found = (tokens * numbers[..., None, :-1]).sum(-1) + numbers[..., None, -1]
    found = torch.where(found.isfinite(), found, 0)
    return torch.exp2(found.round().clamp(-MOST_USE, MOST_USE))


def use_from(use: Tensor, start: Tensor, reach: Reach, ratio: Tensor | None) -> Tensor:
    """`[R, h, K + V + 1]` what weighs tokens after the positions `start` `[R, 1]` as if these were 0.

    It was learned from texts of the trained length, and a key says where it is. Turning all keys back is
    turning forward what they are multiplied by.

    Args:
        use: `[h, K + V + 1]` as learned.
        start: one position for each row. reach: how the model turns keys.
        ratio: `[h, 1, R]`, see `Reach.turned`; None if keys are as they are.
    """
    given, num = use.expand(len(start), -1, -1), 2 * len(reach.frequencies)
    # What multiplies keys was divided by the factors that keys were multiplied by.
    inverse = None if ratio is None else 1 / ratio[:, 0].double()
    of_keys = reach.turned(given[..., :num].double(), start, inverse)
    return torch.cat([of_keys.float(), given[..., num:]], -1)


class ExpectedUse:
    """The use of tokens to the key/value heads of a layer; texts are added one by one.

    Example:
        >>> from ovq.convert.distances import far_attention
        >>> generator = torch.Generator().manual_seed(0)
        >>> k, v = (torch.randn(1, 1, 40, n, generator=generator) for n in (2, 3))
        >>> o = torch.zeros_like(v)
        >>> q = torch.tensor([4.0, 0.0]).expand_as(k)
        >>> use = ExpectedUse()
        >>> use.start(k, v, num_targets=40, num_sinks=1)
        >>> for part in far_attention(q, k, v, o=o, g=torch.ones_like(o), num_sinks=1, num_recent=4):
        ...     use.see(*part)
        >>> [numbers] = use.numbers()
        >>> len(numbers), numbers[0] > 1
        (6, True)
    """

    def __init__(self) -> None:
        # Of each text [h, T, K + V]; [h, T] sums of the squares of changes; what these are multiplied by.
        self._tokens: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._factors: list[float] = []

    def start(self, k: Tensor, v: Tensor, *, num_targets: int, num_sinks: int, weight: float = 1.0) -> None:
        """Begin with a text that counts so much, as `Distances.start`; first tokens are never in slots."""
        self._num_sinks = num_sinks
        self._tokens.append(torch.cat([k[0], v[0]], -1)[:, num_sinks:].cpu())
        self._squares.append(self._tokens[-1].new_zeros(self._tokens[-1].shape[:2], dtype=torch.float64))
        self._factors.append(weight / num_targets)

    @torch.no_grad()
    def see(self, head: int, queries: Tensor, slopes: Tensor, p: Tensor, change: Tensor) -> None:
        """Learn from a part of the text, which is what `far_attention` yields."""
        # Query heads that share keys lose a token together.
        squares = (p * change).sum(0).square().sum(0)
        self._squares[-1][head] += squares[self._num_sinks :].cpu()

    def uses(self, head: int) -> Tensor:
        """The use of the tokens of all texts to a head, but for first ones."""
        return torch.cat([(x[head] * y).sqrt() for x, y in zip(self._squares, self._factors, strict=True)])

    def numbers(self, key_exponents: Sequence[Sequence[int]] | None = None) -> list[list[float]]:
        """The numbers `[Hkv][K + V + 1]` of `token_weights`.

        Args:
            key_exponents: `[Hkv][K]`, by which powers of 2 the memory multiplies keys; None for 0.
        """
        fitted = torch.stack([self._fitted(head) for head in range(len(self._tokens[0]))])
        if key_exponents is not None:
            exponents = torch.tensor(key_exponents, dtype=torch.float64, device="cpu")
            fitted[:, : exponents.shape[1]] /= torch.exp2(exponents)
        return [[round(number, _DIGITS) for number in head] for head in fitted.tolist()]

    def _fitted(self, head: int) -> Tensor:
        """The numbers for keys as they are, by Newton's method."""
        tokens = torch.cat([x[head].double() for x in self._tokens])
        use = self.uses(head)
        if not float(use.sum()) > 0:
            # A head whose outputs do not matter, or that sees no far tokens.
            return torch.zeros(tokens.shape[1] + 1, dtype=torch.float64, device="cpu")
        use = use / use.mean()
        mean, scale = tokens.mean(0), tokens.std(0).clamp(min=1e-6)
        x = torch.cat([(tokens - mean) / scale, torch.ones_like(use)[:, None]], 1)
        ridge = torch.full_like(x[0], _RIDGE)
        ridge[-1] = 0

        def loss(numbers: Tensor) -> float:
            logs = x @ numbers
            return float((logs.exp() - use * logs).mean() + (ridge * numbers.square()).sum() / 2)

        numbers = torch.zeros_like(ridge)
        now = loss(numbers)
        for _ in range(_STEPS):
            rate = (x @ numbers).exp()
            slope = x.T @ (rate - use) / len(x) + ridge * numbers
            curvature = (x * rate[:, None]).T @ x / len(x) + torch.diag(ridge)
            step = torch.linalg.solve(curvature, slope)
            # Far from the minimum a whole step may lead too far.
            sizes = (0.5**i for i in range(10))
            size = next((s for s in sizes if loss(numbers - s * step) < now), 0.0)
            numbers = numbers - size * step
            before, now = now, loss(numbers)
            if before - now < _LEAST_GAIN:
                break
        slopes = numbers[:-1] / scale
        constant = numbers[-1:] - (slopes * mean).sum()
        return torch.cat([slopes, constant]) / math.log(2)
