"""`ExpectedUse`: predict from a token's key and value how much later queries need it, without training.

Queries only see the mean of the tokens in a slot. For most tokens that does not matter, as no query looks for
them again; it does for a few, such as the digits of a number. If a head lost token i, its outputs would
change by about p_ti (v_i - o_t), and the loss would rise by half the mean over the queries t of

    (p_ti g_t . (v_i - o_t))^2,

with the probabilities p, the outputs o, and the gradients g of the loss with respect to o. The root of that
is the use of a token. The expected use of a new token is modelled as the exponential of a linear function of
its key and value, fitted by Poisson regression [ours]. Expected uses are the token weights in merges: costs
use weights instead of counts, so tokens of little use are merged first, and means are weighted. The softmax
still uses counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ovq.convert.reach import Reach

# Weights are between 2^-MOST_USE and 2^MOST_USE (`MOST_USE` of memory.h).
MOST_USE = 8
# Ridge penalty of the coefficients, for key and value components of variance 1 and a mean use of 1.
_RIDGE = 0.01
# Most steps of Newton's method, and the gain below which it stops.
_STEPS = 12
_LEAST_GAIN = 1e-4
# Digits that are saved, to keep configs short.
_DIGITS = 4


def token_weights(keys: Tensor, values: Tensor, use: Tensor) -> Tensor:
    """Weights `[..., h, T]` of tokens, in float64.

    They are rounded to powers of 2, so that a different order of sums gives the same weights.

    Args:
        keys: `[..., h, T, K]`, as the memory holds them. values: `[..., h, T, V]`.
        use: `[..., h, K + V + 1]` coefficients of the linear function that gives log2 of the weight, the
            constant last.
    """
    numbers = use.double()
    tokens = torch.cat([keys.detach(), values.detach()], -1).double()
    found = (tokens * numbers[..., None, :-1]).sum(-1) + numbers[..., None, -1]
    found = torch.where(found.isfinite(), found, 0)
    return torch.exp2(found.round().clamp(-MOST_USE, MOST_USE))


def use_from(use: Tensor, start: Tensor, reach: Reach, ratio: Tensor | None) -> Tensor:
    """Coefficients `[R, h, K + V + 1]` for tokens whose positions are counted from `start` `[R, 1]`.

    They were learned on texts of the trained length, and keys depend on positions. Instead of rotating all
    keys back by `start`, this rotates their coefficients forward.

    Args:
        use: `[h, K + V + 1]` coefficients as learned.
        start: one position per row. reach: the rotary frequencies.
        ratio: `[h, 1, R]`, see `Reach.turned`; None if keys are not scaled.
    """
    given, num = use.expand(len(start), -1, -1), 2 * len(reach.frequencies)
    # Coefficients were divided by the factors that multiply the keys.
    inverse = None if ratio is None else 1 / ratio[:, 0].double()
    of_keys = reach.turned(given[..., :num].double(), start, inverse)
    return torch.cat([of_keys.float(), given[..., num:]], -1)


class ExpectedUse:
    """Fits the expected use of tokens for the key/value heads of a layer; texts are added one by one."""

    def __init__(self) -> None:
        # Per text: keys and values [h, T, K + V]; sums [h, T] of squared loss changes; factor of these sums.
        self._tokens: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._factors: list[float] = []

    def start(self, k: Tensor, v: Tensor, *, num_targets: int, num_sinks: int, weight: float = 1.0) -> None:
        """Begin a text of this weight, see `Distances.start`; the first `num_sinks` tokens are ignored."""
        self._tokens.append(torch.cat([k[0], v[0]], -1)[:, num_sinks:].cpu())
        self._squares.append(self._tokens[-1].new_zeros(self._tokens[-1].shape[:2], dtype=torch.float64))
        self._factors.append(weight / num_targets)

    @torch.no_grad()
    def see(self, head: int, queries: Tensor, slopes: Tensor, p: Tensor, change: Tensor) -> None:
        """Add a part of the text, as yielded by `far_attention`."""
        # Query heads that share a key/value head lose a token together.
        squares = (p * change).sum(0).square().sum(0)
        self._squares[-1][head, : len(squares)] += squares.cpu()

    def uses(self, head: int) -> Tensor:
        """Use of the tokens of all texts for a head, without the first `num_sinks` of each."""
        return torch.cat([(x[head] * y).sqrt() for x, y in zip(self._squares, self._factors, strict=True)])

    def numbers(self, key_exponents: Sequence[Sequence[int]] | None = None) -> list[list[float]]:
        """Fitted coefficients `[Hkv][K + V + 1]` for `token_weights`.

        Args:
            key_exponents: `[Hkv][K]` exponents of the factors by which the memory scales keys; None for 0.
        """
        fitted = torch.stack([self._fitted(head) for head in range(len(self._tokens[0]))])
        if key_exponents is not None:
            exponents = torch.tensor(key_exponents, dtype=torch.float64, device="cpu")
            fitted[:, : exponents.shape[1]] /= torch.exp2(exponents)
        return [[round(number, _DIGITS) for number in head] for head in fitted.tolist()]

    def _fitted(self, head: int) -> Tensor:
        """Coefficients for unscaled keys, by Newton's method."""
        tokens = torch.cat([x[head].double() for x in self._tokens])
        use = self.uses(head)
        if not float(use.sum()) > 0:
            # A head whose outputs do not affect the loss, or that sees no far tokens.
            return torch.zeros(tokens.shape[1] + 1, dtype=torch.float64, device="cpu")
        use = use / use.mean()
        mean, scale = tokens.mean(0), tokens.std(0).clamp(min=1e-6)
        x = torch.cat([(tokens - mean) / scale, torch.ones_like(use)[:, None]], 1)
        # The curvature only has to point the way, so its product, most of the time, is in float32.
        narrow = x.float()
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
            curvature = ((narrow * rate.float()[:, None]).T @ narrow).double() / len(x) + torch.diag(ridge)
            step = torch.linalg.solve(curvature, slope)
            # Far from the minimum, a full step may overshoot.
            sizes = (0.5**i for i in range(10))
            size = next((s for s in sizes if loss(numbers - s * step) < now), 0.0)
            numbers = numbers - size * step
            before, now = now, loss(numbers)
            if before - now < _LEAST_GAIN:
                break
        slopes = numbers[:-1] / scale
        constant = numbers[-1:] - (slopes * mean).sum()
        return torch.cat([slopes, constant]) / math.log(2)
