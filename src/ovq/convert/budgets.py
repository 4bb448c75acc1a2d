"""`allocate`: which head gets which budget, when the sum of rows is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def allocate(losses: Tensor, rows: Sequence[int], total: float) -> list[int]:
    """For each head an option, so that the sum of losses is small and the sum of rows at most `total`.

    Starts with the fewest rows for every head. Then it makes, again and again, the change that lowers the
    loss by most per row, as long as there are rows left.

    Args:
        losses: `[heads, options]` what each head loses by each option.
        rows: the rows that each option takes.
        total: most rows of all heads together.

    Returns:
        The index of an option per head.

    Raises:
        ValueError: if even the options of fewest rows take more than `total`.

    Example:
        >>> losses = torch.tensor([[9.0, 1.0, 0.0], [1.0, 0.9, 0.8]])
        >>> allocate(losses, [10, 20, 40], 30)
        [1, 0]
        >>> allocate(losses, [10, 20, 40], 50)
        [2, 0]
    """
    return list(dict(changes(losses, rows, total)).values())


def changes(losses: Tensor, rows: Sequence[int], total: float) -> Iterator[tuple[int, int]]:
    """The heads with their first options, and then each change that `allocate` makes: a head, and its next.

    A loss that is not known may be given as 0, which no loss is below. Its option is then taken no later than
    it would be, so as long as it is not taken, all changes are those of the true losses.

    Raises:
        ValueError: as there.
    """
    fewest = min(rows)
    cheapest = [i for i, r in enumerate(rows) if r == fewest]
    chosen = [min(cheapest, key=lambda i: float(loss[i])) for loss in losses]
    left = total - fewest * len(chosen)
    if left < 0:
        raise ValueError(
            f"rows: expected at least {fewest} per head, the smallest option, found {total / len(chosen):g}"
        )
    yield from enumerate(chosen)
    cost = torch.tensor(rows, dtype=torch.float64, device="cpu")
    table = losses.to(torch.float64).cpu()
    while True:
        current = torch.tensor(chosen, device="cpu")
        more = cost[None] - cost[current][:, None]
        gain = table.gather(1, current[:, None]) - table
        rate = gain / more.clamp(min=1e-9)
        is_possible = (gain > 0) & (more <= left)
        # A better option of no more rows is taken at once.
        rate = torch.where((more <= 0) & (gain > 0), torch.inf, rate).masked_fill(~is_possible, -torch.inf)
        best = int(rate.argmax())
        head, option = divmod(best, len(rows))
        if not rate[head, option] > 0:
            return
        left -= float(more[head, option])
        chosen[head] = option
        yield head, option
