"""`allocate`: distribute a total number of rows over heads so that the sum of their losses is small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def allocate(losses: Tensor, rows: Sequence[int], total: float) -> list[int]:
    """Index of one option per head, chosen greedily for a small sum of losses with at most `total` rows.

    Starts with the fewest rows for every head. Then it repeatedly makes the change that lowers the loss most
    per row, while rows are left.

    Args:
        losses: `[heads, options]` loss of each head with each option; inf for an option that is ruled out.
        rows: rows that each option takes.
        total: largest number of rows of all heads together.

    Raises:
        ValueError: if even the smallest options take more than `total`, or losses are NaN.
    """
    return list(dict(changes(losses, rows, total)).values())


def changes(losses: Tensor, rows: Sequence[int], total: float) -> Iterator[tuple[int, int]]:
    """The steps of `allocate` as pairs (head, option): first the start of every head, then each change.

    An unknown loss may be given as its lower bound 0. Its option is then chosen no later than with the true
    loss, so until it is chosen, all changes are those of the true losses.
    """
    if bool((is_nan := losses.isnan()).any()):
        head, option = is_nan.nonzero()[0].tolist()
        raise ValueError(f"losses: expected numbers or inf, found nan (head {head}, option {option})")
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
        # A better option that takes no more rows comes first.
        rate = torch.where((more <= 0) & (gain > 0), torch.inf, rate).masked_fill(~is_possible, -torch.inf)
        best = int(rate.argmax())
        head, option = divmod(best, len(rows))
        if not rate[head, option] > 0:
            return
        left -= float(more[head, option])
        chosen[head] = option
        yield head, option
