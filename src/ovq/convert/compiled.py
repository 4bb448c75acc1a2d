"""`advance`: read new tokens into the memories of a layer, with compiled kernels where possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.memory import HeadMemory
from ovq.ops.backends.cpu import KNOWN
from ovq.ops.backends.cpu.kernels import DTYPES, is_available
from ovq.ops.backends.cpu.memory import advance_memory
from ovq.ops.state import pending_in
from ovq.ops.transforms import needs_operations


def is_compiled(memories: Sequence[HeadMemory], k: Tensor, v: Tensor, *tensors: Tensor | None) -> bool:
    """Whether compiled kernels support these memories, k, v and `tensors` (queries, temperatures, biases).

    They support neither gradients, nor other derivatives, nor modes, nor observers.
    """
    if memories[0].budget.merge not in KNOWN.merge or memories[0].observer is not None:
        return False
    given = [x for x in (k, v, *tensors) if x is not None]
    return (
        all(x.device.type == "cpu" for x in given)
        and {v.dtype, *(x.dtype for x in pending_in(memories[0].state)[:2])} == {k.dtype}
        and all(x.dtype in DTYPES for x in given)
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in given))
        and not needs_operations()
        and is_available()
    )


def advance(
    memories: Sequence[HeadMemory],
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    *,
    q: Tensor | None = None,
    temperature: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor | None:
    """`HeadMemory.attend` for all memories of a layer at once: `[B, H, T, V]`; None without queries.

    Args:
        memories: the heads of their budgets partition those of k and v.
        k: `[B, Hkv, T, K]`. v: `[B, Hkv, T, V]`. q: `[B, H, T, K]`, scaled; None for no outputs.
        lengths: real tokens of each row, which come first.
        temperature: `[H]`, see `HeadMemory.attend`. bias: `[H]`.
    """
    can_compile = is_compiled(memories, k, v, q, temperature, bias)
    if not can_compile and len(memories) == 1:
        return memories[0].attend(q, k, v, lengths, temperature=temperature, bias=bias)
    o = None if q is None else q.new_zeros(*q.shape[:3], v.shape[3])
    if can_compile:
        # Kernels read along the last dimension.
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        q = q if q is None or q.stride(-1) == 1 else q.contiguous()
        temperature, bias = (
            None if x is None else x.detach().float().contiguous() for x in (temperature, bias)
        )
        given: dict[str, Any] = {"k": k, "v": v, "q": q, "o": o, "temperature": temperature, "bias": bias}
        groups = []
        for memory in memories:
            memory.own_()
            groups.append(memory.group(lengths, memory.schedule(lengths), **given))
            memory.count_tokens(lengths)
        advance_memory(groups)
        return o
    for memory in memories:
        per_head = 0 if q is None else q.shape[1] // k.shape[1]
        own = list(memory.budget.heads)
        of_queries = [h * per_head + i for h in own for i in range(per_head)]
        found = memory.attend(
            None if q is None else q[:, of_queries],
            k[:, own],
            v[:, own],
            lengths,
            temperature=None if temperature is None else temperature[of_queries],
            bias=None if bias is None else bias[of_queries],
        )
        if o is not None and found is not None:
            o[:, of_queries] = found
    return o
