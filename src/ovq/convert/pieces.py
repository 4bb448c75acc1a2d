"""`in_pieces`: read the tokens of rows in pieces, cut where the memories of the rows change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def in_pieces(
    read: Callable[..., Any],
    lengths: Sequence[int],
    room: Callable[[int, int], int],
    k: Tensor,
    v: Tensor,
    q: Tensor | None,
) -> Tensor | None:
    """Outputs `[B, H, T, V]` of tokens that `read` gets in pieces, 0 for others; None without queries.

    Pieces may end at different tokens of each row. The gradient of a slice is as large as the whole, so that
    slices would make it quadratic in tokens: all tokens are moved at once to where pieces begin at the same
    place in all rows, then split.

    Args:
        read: called with each row's number of tokens in a piece, their k and v, and q if there are queries;
            each row's tokens come first. Returns their outputs.
        lengths: number of tokens of each row, which come first.
        room: most tokens of a row in its next piece, from the row and its tokens in earlier pieces.
        k: `[B, Hkv, T, K]`. v: `[B, Hkv, T, V]`. q: `[B, H, T, K]`, or None.
    """
    done, sizes = [0] * len(k), []
    while done != list(lengths):
        left = enumerate(zip(lengths, done, strict=True))
        sizes.append([min(num - before, room(row, before)) for row, (num, before) in left])
        done = [before + now for before, now in zip(done, sizes[-1], strict=True)]
    most = [max(now) for now in sizes]
    moves: list[tuple[int, int, int]] = []
    if any(len({*now}) > 1 for now in sizes):
        first, done = 0, [0] * len(k)
        for now in sizes:
            moves += [(b, done[b] + i, first + i) for b, num in enumerate(now) for i in range(num)]
            first, done = first + max(now), [d + num for d, num in zip(done, now, strict=True)]
        # Rows, places of their tokens, and places where pieces begin alike.
        rows, source, target = torch.tensor(moves, device=k.device).T

    def split(x: Tensor) -> tuple[Tensor, ...]:
        if moves:
            moved = x.new_zeros(*x.shape[:2], sum(most), x.shape[3])
            moved[rows, :, target] = x[rows, :, source]
            x = moved
        return x.split([*most, x.shape[2] - sum(most)], 2)[:-1]

    tokens = (k, v) if q is None else (k, v, q)
    found = [read(now, *own) for now, *own in zip(sizes, *map(split, tokens), strict=True)]
    if q is None:
        return None
    o = q.new_zeros(*q.shape[:3], v.shape[3])
    if not moves:
        return torch.cat([*found, o[:, :, sum(most) :]], 2)
    o[rows, :, source] = torch.cat(found, 2)[rows, :, target]
    return o
