"""Selection kernels of the merge rules: the best two of many scores, the lowest of many priorities."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.options import TIE

# Columns of a score matrix per block. The maximum is found as the best block, then the best column in it,
# which reads the scores once, vectorised (an argmax over all columns takes six times as long on a CPU).
BLOCK = 32


def padded_to_blocks(num: int) -> int:
    """`num` rounded up to a multiple of `BLOCK`."""
    return -(-num // BLOCK) * BLOCK


def best_two(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Column and score of the maximum of each row, and the second highest score, `[S, A]` each.

    Args:
        scores: `[S, A, M]`, M a multiple of `BLOCK`.

    Example:
        >>> scores = torch.arange(64.0).view(1, 1, 64).index_fill(2, torch.tensor([63]), 40.5)
        >>> best_two(scores)
        (tensor([[62]]), tensor([[62.]]), tensor([[61.]]))
    """
    streams, rows, num = scores.shape
    block_best = scores.view(streams, rows, num // BLOCK, BLOCK).amax(-1)
    block = block_best.max(-1, keepdim=True).indices
    first = torch.arange(0, scores.numel() // BLOCK, num // BLOCK, device=scores.device).view(block.shape)
    inside = scores.view(-1, BLOCK).index_select(0, (first + block).flatten()).view(streams, rows, BLOCK)
    best, place = inside.max(-1, keepdim=True)
    # Maximum of all other columns: those of the other blocks, and the rest of the best block.
    inside.scatter_(-1, place, -torch.inf)
    block_best.scatter_(-1, block, -torch.inf)
    second = torch.maximum(inside.amax(-1), block_best.amax(-1))
    return (block * BLOCK + place).squeeze(-1), best.squeeze(-1), second


def lowest(priority: Tensor, num: Tensor, most: int) -> Tensor:
    """Mask `[S, M]` of the `num[s]` lowest priorities of each stream (ties: lowest index).

    Args:
        priority: `[S, M]`; the lowest `num[s]` must be finite.
        num: `[S]`. most: at least the maximum of `num`.

    Example:
        >>> lowest(torch.tensor([[3.0, 1.0, 3.0, 2.0]]), torch.tensor([3]), 3)
        tensor([[ True,  True, False,  True]])
    """
    wanted = num[:, None]
    boundary = priority.topk(most, largest=False).values.gather(-1, (wanted - 1).clamp(min=0))
    tie = TIE * boundary.clamp(min=1)
    is_clear = priority < boundary - tie
    is_tied = (priority - boundary).abs() <= tie
    is_tied &= is_tied.cumsum(-1) <= wanted - is_clear.sum(-1, keepdim=True)
    return (is_clear | is_tied) & (wanted > 0)
