"""Which slots the tokens of full windows, and what slots hold, go to by the merge rules of `ovq.ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovq.convert.config import Budget
from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.cpu import KNOWN
from ovq.ops.backends.cpu.kernels import is_available
from ovq.ops.backends.cpu.kernels import learn_and_say as compiled_learn
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.torch.learn import learn
from ovq.ops.call import Rows


def homes_of(
    budget: Budget,
    num_merged: Sequence[int],
    sums: Dictionary,
    keys: Tensor,
    values: Tensor,
    weights: Tensor | None,
) -> Tensor:
    """The slots `[R, h, N + C]` of what is in N slots and of C tokens of each row, whose windows are full.

    Args:
        budget: sizes and rule.
        num_merged: tokens that each row has merged before.
        sums: what the slots hold; changed in place.
        keys: `[R, h, C, K]` in the units and the dtype of the sums. values: `[R, h, C, V]`.
        weights: `[R, h, C]` of the tokens, or None.
    """
    rows, heads, size, _ = keys.shape
    one_chunk_each = Rows(tuple(range(0, rows * size, size)), (size,) * rows)
    aligned = AlignedRows(one_chunk_each, pending=[0] * rows, chunk_size=size, num_tokens=rows * size)
    options = budget.options
    plan = Plan(
        aligned=aligned,
        slots=[[budget.num_open(n), budget.num_open(n + size)] for n in num_merged],
        num_merged=list(num_merged),
        num_kv_heads=heads,
        group_size=1,
        options=options,
    )
    is_compiled = keys.device.type == "cpu" and keys.dtype == torch.float32
    is_compiled = is_compiled and options.merge in KNOWN.merge and is_available()
    given = [] if weights is None else [weights.transpose(1, 2)[..., None]]
    learned = (compiled_learn if is_compiled else learn)(
        keys.transpose(1, 2), values.transpose(1, 2), sums, plan, *given
    )
    if learned.moved is None:
        moved = torch.arange(budget.num_slots, device=keys.device).expand(rows, heads, budget.num_slots)
    else:
        moved = learned.moved.long()
    return torch.cat([moved, learned.slots.long().transpose(1, 2)], 2)
