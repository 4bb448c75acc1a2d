"""Calls that cost less as several: packed rows of very different lengths, and a few tokens of streams."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ovq.ops.call import Call, Rows, Run
from ovq.ops.schedule import slots_by_chunk
from ovq.ops.state import OVQState, tensors_of

# Tokens per row that are read one by one: decode steps read a dictionary in place, other calls copy it.
_FEW_TOKENS = 16
# Rows are grouped if more than this many times as much would be allocated without groups.
_LEAST_SAVED = 4


def has_few_tokens(call: Call) -> bool:
    """Whether each row of a call continues a stream by a few tokens, without gradients."""
    num = call.q.shape[1]
    if not 1 < num <= _FEW_TOKENS or not call.state.count.shape[2] or call.wants_gradients:
        return False
    return len(call.rows) == call.q.shape[0] and min(call.rows.lengths) == num


def token_by_token(call: Call, run: Run) -> tuple[Tensor, OVQState | None]:
    """Outputs and final state of a call that `has_few_tokens`; `run` runs each token."""
    rows = Rows(tuple(range(len(call.rows))), (1,) * len(call.rows))
    outputs, state = [], call.state
    for t in range(call.q.shape[1]):
        names = ("q", "k", "v", *call.gates)
        token = {name: getattr(call, name)[:, t : t + 1] for name in names}
        o, after = run(dataclasses.replace(call, **token, rows=rows, state=state, wants_state=True))
        assert after is not None
        outputs.append(o)
        state = after
    return torch.cat(outputs, 1), state


def groups_of(call: Call) -> list[list[int]]:
    """Rows of a call in groups to run separately; one group if nothing is saved.

    Dictionaries of rows that run together have as many slots as the longest row needs. Without a state before
    and after, rows may have as many as they need, within a factor of 4.
    """
    rows, options = call.rows.lengths, call.options
    is_alike = len(set(rows)) < 2 or max(rows) < options.chunk_size
    if call.wants_state or is_alike or bool(call.state.num_seen.any()):
        return [list(range(len(rows)))]
    return alike([slots_by_chunk(0, 0, n // options.chunk_size, **options.schedule)[-1] for n in rows])


def alike(sizes: Sequence[int]) -> list[list[int]]:
    """Indices of sizes in groups to run separately, if each takes as much room as the largest of its group.

    One group unless that takes over 4 times as much as the sizes; else those of a group are within a factor
    of 4.

    Example:
        >>> alike([1, 3, 100, 2, 1, 1, 2, 80]), alike([1, 3, 100])
        ([[0, 1, 3, 4, 5, 6], [2, 7]], [[0, 1, 2]])
    """
    if len(sizes) * max(sizes, default=0) <= _LEAST_SAVED * sum(sizes):
        return [list(range(len(sizes)))]
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for i, size in enumerate(sizes):
        groups[(size.bit_length() + 1) // 2].append(i)
    return list(groups.values())


def in_groups(call: Call, run: Run, groups: Sequence[Sequence[int]]) -> tuple[Tensor, None]:
    """Outputs of a call, of `groups_of` its rows; `run` runs each group."""
    o: Tensor | None = None
    for group in groups:
        starts, lengths = (tuple(x[row] for row in group) for x in (call.rows.starts, call.rows.lengths))
        # Backends run no call without tokens.
        if not any(lengths):
            continue
        # All rows of the state are empty.
        first = {name: x[: len(group)] for name, x in tensors_of(call.state).items()}
        state = dataclasses.replace(call.state, **first)  # type: ignore[arg-type]  # these are tensors
        # Zero at the tokens of other groups.
        found, _ = run(dataclasses.replace(call, rows=Rows(starts, lengths), state=state))
        o = found if o is None else o + found
    assert o is not None
    return o, None
