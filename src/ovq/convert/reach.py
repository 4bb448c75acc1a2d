"""`Reach`: how a converted model reads on beyond the length that it was trained on.

A model that was trained on texts of L tokens has never seen a key further than L positions away, and few
that were nearly as far. Rotary keys say how far away they are: turned further by n positions, a key is what
it would have been n positions later, and so is a mean of keys, as turning is linear. So once a text is longer
than L, what lies further away than some distance is turned until it lies within, at regular places of the
text, and stays there [ours]. Each slot knows the mean position of its tokens for that; a turned one takes on
the position that it was brought to.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# Rows are turned each time that this share of the most distance has been read, so that it costs little. They
# are brought nearer than the most distance by as much.
_PARTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """When and how far rows are brought nearer, and how the model turns keys.

    Attributes:
        trained_length: the length of texts up to which nothing is brought nearer.
        max_distance: beyond that length, the most distance between a query and a row that it reads.
        frequencies: angles by which one position turns each pair of numbers of a key, i and i + R of the
            first 2 R.

    Example:
        >>> reach = Reach(trained_length=100, max_distance=32, frequencies=(1.0,))
        >>> reach.interval, reach.limit
        (4, 28)
        >>> reach.until_turn(0), reach.until_turn(99), reach.until_turn(100)
        (100, 1, 4)
    """

    trained_length: int
    max_distance: int
    frequencies: tuple[float, ...]

    @property
    def interval(self) -> int:
        """Rows are turned after multiples of so many tokens."""
        return self.max_distance // _PARTS

    @property
    def first_turn(self) -> int:
        """The first of them, so that no text longer than `trained_length` is read before."""
        return max(1, self.trained_length // self.interval) * self.interval

    @property
    def limit(self) -> int:
        """Distance from the last token to which rows are brought that are further away."""
        return self.max_distance - self.interval

    def until_turn(self, num_read: int) -> int:
        """Tokens until rows are turned, once `num_read` have been read; at least 1."""
        return max(self.first_turn, (num_read // self.interval + 1) * self.interval) - num_read

    def is_turn(self, num_read: int) -> bool:
        """Whether rows are turned once `num_read` tokens have been read."""
        return num_read >= self.first_turn and num_read % self.interval == 0

    def turned(self, x: Tensor, positions: Tensor, ratio: Tensor | None = None) -> Tensor:
        """Keys, or sums of keys, turned further by so many positions.

        Args:
            x: `[..., K]`. positions: `[...]`.
            ratio: `[..., R]`, if numbers of keys were multiplied by factors: that of number i divided by that
                of number i + R.

        Example:
            >>> reach = Reach(trained_length=64, max_distance=16, frequencies=(torch.pi / 4,))
            >>> reach.turned(torch.tensor([1.0, 0.0, 5.0]), torch.tensor(2)).round(decimals=4)
            tensor([0., 1., 5.])
        """
        # In float64, as angles are large and their cosines must not depend on the order of sums.
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=x.device)
        angles = positions.double()[..., None] * frequencies
        cos, sin = (f(angles).to(x.dtype) for f in (torch.cos, torch.sin))
        num = len(self.frequencies)
        a, b, rest = x[..., :num], x[..., num : 2 * num], x[..., 2 * num :]
        to_a, to_b = (sin, sin) if ratio is None else (sin * ratio, sin / ratio)
        return torch.cat([cos * a - to_a * b, cos * b + to_b * a, rest], -1)
