"""`Pieces`: tokens of rows, cut where the memories of the rows change, and outputs joined again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def piece_sizes(lengths: Sequence[int], room: Callable[[int, int], float]) -> list[list[int]]:
    """Tokens of each row in each piece, of `lengths` tokens in all.

    Args:
        lengths: tokens of each row.
        room: most tokens of a row in its next piece, from the row and its tokens in earlier pieces.

    Example:
        >>> piece_sizes([5, 2], lambda row, done: 3 - row)
        [[3, 2], [2, 0]]
    """
    done, sizes = [0] * len(lengths), []
    while done != list(lengths):
        left = enumerate(zip(lengths, done, strict=True))
        sizes.append([int(min(num - before, room(row, before))) for row, (num, before) in left])
        done = [before + now for before, now in zip(done, sizes[-1], strict=True)]
    return sizes


class Pieces:
    """Cuts the tokens of B rows into pieces, which may end at different tokens of each row.

    The gradient of a slice is as large as the whole, so that slices would make it quadratic in tokens: all
    tokens are moved at once to where pieces begin at the same place in all rows, then split.

    Args:
        sizes: tokens of each row in each piece, `sizes[piece][row]`.
        device: of the tokens.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], device: torch.device) -> None:
        self._sizes = [max(now) for now in sizes]
        self._moves: Tensor | None = None
        if any(len({*now}) > 1 for now in sizes):
            moves, first, done = [], 0, [0] * len(sizes[0])
            for now in sizes:
                moves += [(b, done[b] + i, first + i) for b, num in enumerate(now) for i in range(num)]
                first, done = first + max(now), [d + num for d, num in zip(done, now, strict=True)]
            # Rows, places of their tokens, and places where pieces begin alike.
            self._moves = torch.tensor(moves, device=device).T

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The pieces `[B, H, max(sizes[piece]), D]` of tokens `[B, H, T, D]`; each row's own come first."""
        num = sum(self._sizes)
        if self._moves is not None:
            rows, source, target = self._moves
            moved = x.new_zeros(*x.shape[:2], num, x.shape[3])
            moved[rows, :, target] = x[rows, :, source]
            x = moved
        return x.split([*self._sizes, x.shape[2] - num], 2)[:-1]

    def join(self, pieces: Sequence[Tensor], o: Tensor) -> Tensor:
        """`o` `[B, H, T, D]`, of zeros, with the tokens of such pieces in their places."""
        if self._moves is None:
            return torch.cat([*pieces, o[:, :, sum(self._sizes) :]], 2)
        rows, source, target = self._moves
        o[rows, :, source] = torch.cat([*pieces], 2)[rows, :, target]
        return o
