"""Memories (`memory.py`) that compiled kernels read and advance, all heads of a layer in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ovq.convert.config import Budget
from ovq.ops.backends.cpu import KNOWN
from ovq.ops.backends.cpu.kernels import DTYPES, is_available
from ovq.ops.backends.cpu.memory import HeadGroup, advance_memory


class Memory(Protocol):
    """What kernels need of a `HeadMemory`, beside the tensors of its slots."""

    budget: Budget
    recent_keys: Tensor
    recent_values: Tensor
    filled: list[int]
    num_merged: list[int]

    @property
    def observer(self) -> object:
        """Who is told of what is read; None for nobody."""

    def own_(self) -> None:
        """Copy what autograd has saved, so that tensors can be written into."""

    def kernel_tensors(self) -> dict[str, Tensor]:
        """The tensors that kernels read and write."""


def is_compiled(memories: Sequence[Memory], k: Tensor, v: Tensor, *tensors: Tensor | None) -> bool:
    """Whether compiled kernels can let memories read `tensors` (queries, and what is learned) with k and v.

    They know no gradients, and tell no observer.
    """
    if memories[0].budget.merge not in KNOWN.merge or memories[0].observer is not None:
        return False
    given = [x for x in (k, v, *tensors) if x is not None]
    return (
        all(x.device.type == "cpu" for x in given)
        and {v.dtype, memories[0].recent_keys.dtype, memories[0].recent_values.dtype} == {k.dtype}
        and all(x.dtype in DTYPES for x in given)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
        and is_available()
    )


def schedule_of(memory: Memory, lengths: Sequence[int]) -> list[list[int]]:
    """Slots in use of each row, and after each merge while it reads so many tokens."""
    budget = memory.budget
    return [
        [
            budget.num_open(num_merged + i * budget.chunk_size)
            for i in range(_num_merges(memory, row, num_new) + 1)
        ]
        for row, (num_merged, num_new) in enumerate(zip(memory.num_merged, lengths, strict=True))
    ]


def count_tokens(memory: Memory, lengths: Sequence[int]) -> None:
    """Count tokens of each row that a kernel has read, and what it has merged."""
    for row, num_new in enumerate(lengths):
        num_merged = _num_merges(memory, row, num_new) * memory.budget.chunk_size
        memory.filled[row] += num_new - num_merged
        memory.num_merged[row] += num_merged


def _num_merges(memory: Memory, row: int, num_new: int) -> int:
    budget = memory.budget
    return max(0, memory.filled[row] + num_new - budget.num_exact + budget.chunk_size) // budget.chunk_size


def advance_compiled(
    parts: Sequence[tuple[Memory, Sequence[int]]],
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    q: Tensor | None = None,
    o: Tensor | None = None,
    temperature: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """`HeadMemory.attend` of several memories of a layer at once, or `learn` without q.

    Args:
        parts: memories, each with its places among the key/value heads of k and v.
        k: `[B, Hkv, T, K]`. v: `[B, Hkv, T, V]`. q: `[B, H, T, K]`, scaled.
        lengths: real tokens of each row, which come first.
        o: `[B, H, T, V]` that gets the outputs of real tokens.
        temperature: `[H]`, see `HeadMemory.attend`. bias: `[H]`.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    q = q if q is None or q.stride(-1) == 1 else q.contiguous()
    learned = {
        name: None if x is None else x.detach().float().contiguous()
        for name, x in (("temperature", temperature), ("bias", bias))
    }
    groups = []
    for memory, heads in parts:
        memory.own_()
        budget = memory.budget
        groups.append(
            HeadGroup.of(
                memory.kernel_tensors(),
                heads=heads,
                num_sinks=budget.num_sinks,
                chunk_size=budget.chunk_size,
                options=budget.options if budget.num_slots else None,
                filled=memory.filled,
                num_merged=memory.num_merged,
                lengths=lengths,
                schedule=schedule_of(memory, lengths),
                k=k,
                v=v,
                q=q,
                o=o,
                **learned,
            )
        )
        count_tokens(memory, lengths)
    advance_memory(groups)
