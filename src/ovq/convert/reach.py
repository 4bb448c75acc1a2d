"""`Reach`: re-position keys so that a converted model can read beyond its trained length.

A model trained on texts of L tokens has never seen a key more than L positions away, and few that were nearly
as far. A rotary key encodes its position: rotated by n more positions, it is the key n positions later. The
same holds for a mean of keys, as rotation is linear. So once a text is longer than L, keys of sinks and slots
beyond a maximum distance are rotated at regular intervals so that they lie within it [ours]. Each slot knows
the mean position of its tokens for that; a re-positioned slot gets its new position.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

# Keys are re-positioned once per `max_distance / _PARTS` tokens, so that it costs little, and to within
# `max_distance` minus that interval, so that they stay within `max_distance` until the next time.
_PARTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reach:
    """When and how far keys are re-positioned, and the model's rotary frequencies.

    Attributes:
        trained_length: length of texts up to which nothing is re-positioned.
        max_distance: beyond that length, largest distance between a query and a sink or slot.
        frequencies: rotation per position, in radians, of each pair of key components (i, i + R) for i < R.
    """

    trained_length: int
    max_distance: int
    frequencies: tuple[float, ...]

    @property
    def interval(self) -> int:
        """Tokens between two re-positionings, which take place at multiples of it."""
        return self.max_distance // _PARTS

    @property
    def first_reposition(self) -> int:
        """Tokens before the first one: `trained_length` rounded down to a multiple of `interval`, not 0."""
        return max(1, self.trained_length // self.interval) * self.interval

    @property
    def limit(self) -> int:
        """Distance from the last token to which keys further away are moved."""
        return self.max_distance - self.interval

    def until_reposition(self, num_read: int) -> int:
        """Tokens until the next re-positioning, after `num_read` tokens; at least 1."""
        return max(self.first_reposition, (num_read // self.interval + 1) * self.interval) - num_read

    def is_reposition_due(self, num_read: int) -> bool:
        """Whether keys are re-positioned after `num_read` tokens."""
        return num_read >= self.first_reposition and num_read % self.interval == 0

    def turned(self, x: Tensor, positions: Tensor, ratio: Tensor | None = None) -> Tensor:
        """Keys, or sums of keys, rotated by `positions` more positions.

        Args:
            x: `[..., K]`. positions: `[...]`.
            ratio: `[..., R]`, if key components are scaled by factors: factor of component i divided by that
                of component i + R. None for no factors.
        """
        # In float64: angles are large, and their cosines must not depend on the order of sums.
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=x.device)
        angles = positions.double()[..., None] * frequencies
        cos, sin = (f(angles).to(x.dtype) for f in (torch.cos, torch.sin))
        num = len(self.frequencies)
        a, b, rest = x[..., :num], x[..., num : 2 * num], x[..., 2 * num :]
        to_a, to_b = (sin, sin) if ratio is None else (sin * ratio, sin / ratio)
        return torch.cat([cos * a - to_a * b, cos * b + to_b * a, rest], -1)
