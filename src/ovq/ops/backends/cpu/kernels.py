"""The kernels as an autograd function: the work of `torch/chunk.py`, for all streams in one call."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.backends.cpu import build
from ovq.ops.backends.dictionary import Dictionary, dense_copy
from ovq.ops.backends.learned import Learned
from ovq.ops.backends.plan import Plan
from ovq.ops.options import TIE
from ovq.ops.random_init import random_priority

# What inputs may be, each by its number in numbers.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpu_kernels() -> str:
    """Whether there are compiled kernels for this CPU, the backend `cpu`, and where from; if not, why.

    The answer is "compiled for this processor" (here, on first use), "compiled in advance for LEVEL" (they
    came with the package), "compiled for LEVEL" (`OVQ_CPU_KERNELS` asked for a level) or "not available:
    REASON". The first call builds them if necessary, as the first call of the op does. The answer holds for
    the life of the process.

    Example:
        >>> cpu_kernels().startswith(("compiled", "not available"))
        True
    """
    try:
        return build.origin()
    except build.Unavailable as error:
        return f"not available: {error}"


def is_available() -> bool:
    """Whether there are compiled kernels on this machine; warns once if they could not be built."""
    try:
        build.load()
    except build.SwitchedOff:
        return False
    except build.Unavailable as error:
        build.warn_once(error)
        return False
    return True


class CompiledAttention(torch.autograd.Function):
    """`chunk_attention` run by the kernels; arguments, results and the rewinding backward are the same."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        key_sum: Tensor,
        value_sum: Tensor,
        count: Tensor,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read and merge all chunks."""
        q, k, v = (dense(x) for x in (q, k, v))
        key_sum, value_sum, count = (dense_copy(x) for x in (key_sum, value_sum, count))
        o = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
        # The log-sum-exp of each query, and the slot of each token of a complete chunk.
        lse, slots = torch.empty(q.shape[:3]), torch.zeros(k.shape[:3], dtype=torch.int32)
        call = _call(q, k, v, o, lse, scale, key_sum, value_sum, count, slots, plan)
        if plan.options.init == "random":
            call.point(priority=_priorities(plan))
        merged = []
        if plan.options.merges_pairs and any(ctx.needs_input_grad):
            merged = _merged(k, v, plan)
            call.point(**dict(zip(_MERGED, merged, strict=True)))
        call.run("ovq_forward")
        ctx.save_for_backward(q, k, v, scale, o, key_sum, value_sum, count, lse, slots, *merged)
        ctx.plan = plan
        ctx.mark_non_differentiable(count)
        ctx.set_materialize_grads(False)
        return o, key_sum, value_sum, count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_o: Tensor | None, grad_key_sum: Tensor | None, grad_value_sum: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        """Rewind the sums; the gradient of the final sums becomes that of the initial ones."""
        q, k, v, scale, o, key_sum, value_sum, count, lse, slots, *merged = ctx.saved_tensors
        grad_o = torch.zeros_like(o) if grad_o is None else dense(grad_o)
        key_deposit = torch.zeros_like(key_sum) if grad_key_sum is None else dense_copy(grad_key_sum)
        value_deposit = torch.zeros_like(value_sum) if grad_value_sum is None else dense_copy(grad_value_sum)
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
        grad_scale = torch.zeros(len(ctx.plan.slots), q.shape[2], dtype=torch.float64)
        # Copies, because the kernels rewind them in place.
        key_sum, value_sum, count = (dense_copy(x) for x in (key_sum, value_sum, count))
        call = _call(q, k, v, o, lse, scale, key_sum, value_sum, count, slots, ctx.plan)
        call.set_tokens(grad_o=grad_o, grad_q=grads[0], grad_k=grads[1], grad_v=grads[2])
        call.point(**dict(zip(_MERGED, merged, strict=False)))
        call.point(key_deposit=key_deposit, value_deposit=value_deposit, grad_scale=grad_scale)
        call.run("ovq_backward")
        return *grads, grad_scale.sum(0).to(scale.dtype), key_deposit, value_deposit, None, None


def learn(k: Tensor, v: Tensor, sums: Dictionary, plan: Plan, *, merged: Sequence[Tensor] = ()) -> Tensor:
    """Merge complete chunks into dictionaries, in place, without reading: a plan without query heads.

    Args:
        k: `[num_chunks, C, Hkv, K]`. v: `[num_chunks, C, Hkv, V]`.
        sums: `[R, Hkv, M, ...]`, contiguous.
        plan: the plan of these rows, with `group_size` 0.
        merged: where pairs are merged, tensors for the slots that are merged into others, if wanted.

    Returns:
        The slot of each token, `[num_chunks, C, Hkv]`.
    """
    k, v = dense(k), dense(v)
    nothing = torch.empty(0)
    slots = torch.zeros(k.shape[:3], dtype=torch.int32)
    call = _call(k, k, v, v, nothing, nothing, sums.key_sum, sums.value_sum, sums.count, slots, plan)
    if plan.options.init == "random":
        call.point(priority=_priorities(plan))
    call.point(**dict(zip(_MERGED, merged, strict=False)))
    call.run("ovq_forward")
    return slots


def learn_and_say(k: Tensor, v: Tensor, sums: Dictionary, plan: Plan) -> Learned:
    """Merge all complete chunks, in place; see `ovq.ops.backends.learned.Learn`."""
    plan = dataclasses.replace(plan, group_size=0)
    if not plan.options.merges_pairs:
        return Learned(learn(k, v, sums, plan), None)
    merged = _merged(k, v, plan)
    source, target = merged[:2]
    # Chunks write no more than what they merged, and -1 after it.
    source.fill_(-1)
    slots = learn(k, v, sums, plan, merged=merged)
    chunk, head, place = (source.ge(0).cumprod(-1) > 0).nonzero(as_tuple=True)
    moved = torch.arange(sums.count.shape[2], dtype=torch.int32).repeat(*source.shape[:2], 1)
    moved[chunk, head, source[chunk, head, place].long()] = target[chunk, head, place]
    return Learned(slots, moved)


def dense(x: Tensor) -> Tensor:
    """`x` with each vector contiguous in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _priorities(plan: Plan) -> Tensor:
    """`[chunks, Hkv, C]` random ranks of each chunk's keys, with an unused chunk after each row's last."""
    size, rows = plan.options.chunk_size, []
    for merged, sizes in zip(plan.num_merged, plan.slots, strict=True):
        for i in range(len(sizes)):
            seen = merged + (i + 1) * size
            rows += [random_priority(plan.options.seed, h, seen, size) for h in range(plan.num_kv_heads)]
    return torch.stack(rows)


# The slots that chunks merged into others, the slots they went into, and their sums: with these, the backward
# undoes the merges.
_MERGED = ("merged_slot", "merged_into", "merged_key", "merged_value", "merged_count")


def _merged(k: Tensor, v: Tensor, plan: Plan) -> list[Tensor]:
    """Allocate `_MERGED` for every chunk.

    A chunk seldom merges as many slots as it has tokens, but the system provides memory only once it is
    written to.
    """
    shape = (k.shape[0], k.shape[2], plan.options.chunk_size)
    return [
        torch.empty(shape, dtype=torch.int32),
        torch.empty(shape, dtype=torch.int32),
        torch.empty(*shape, k.shape[3]),
        torch.empty(*shape, v.shape[3]),
        torch.empty(shape, dtype=torch.int64),
    ]


class _Tokens(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3), ("dim", ctypes.c_int64)]


class _Arguments(ctypes.Structure):
    """`Call` of call.h, field by field; keeps the tensors that it points to alive."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_rows", "num_kv_heads", "group_size", "chunk_size")),
        *((name, ctypes.c_int64) for name in ("width", "capacity", "num_threads")),
        *((name, ctypes.c_int64) for name in ("dtype", "is_merge_updated", "is_ward", "is_sqrt")),
        *((name, ctypes.c_double) for name in ("tie", "value_weight")),
        *((name, _Tokens) for name in ("q", "k", "v", "o")),
        *((name, ctypes.c_void_p) for name in ("lse", "scale", "key_sum", "value_sum", "count", "slots")),
        *((name, ctypes.c_void_p) for name in ("first_chunk", "length", "schedule_start", "schedule")),
        ("priority", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _MERGED),
        *((name, _Tokens) for name in ("grad_o", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("key_deposit", "value_deposit", "grad_scale")),
    ]

    def set_tokens(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            strides = (ctypes.c_int64 * 3)(*x.stride()[:3])
            setattr(self, name, _Tokens(self._keep(x), strides, x.shape[-1]))

    def point(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            assert x.is_contiguous(), name
            setattr(self, name, self._keep(x))

    def run(self, name: str) -> None:
        if getattr(build.load(), name)(ctypes.byref(self)):
            raise MemoryError(f"{name}: no memory for the kernel's scratch")

    def _keep(self, x: Tensor) -> int:
        if not hasattr(self, "kept"):
            self.kept = []
        self.kept.append(x)
        return x.data_ptr()


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    count: Tensor,
    slots: Tensor,
    plan: Plan,
) -> _Arguments:
    options, aligned = plan.options, plan.aligned
    call = _Arguments(
        num_rows=len(plan.slots),
        num_kv_heads=plan.num_kv_heads,
        group_size=plan.group_size,
        chunk_size=options.chunk_size,
        width=aligned.width,
        capacity=key_sum.shape[2],
        num_threads=torch.get_num_threads(),
        dtype=DTYPES.index(q.dtype),
        is_merge_updated=options.merge == "updated",
        is_ward=options.merges_pairs,
        is_sqrt=options.merge == "ward-sqrt",
        tie=TIE,
        value_weight=options.value_weight,
    )
    starts = [0, *itertools.accumulate(len(sizes) for sizes in plan.slots)]
    call.set_tokens(q=q, k=k, v=v, o=o)
    call.point(
        lse=lse,
        scale=scale.contiguous(),
        key_sum=key_sum,
        value_sum=value_sum,
        count=count,
        slots=slots,
        first_chunk=torch.tensor(aligned.first_chunk, dtype=torch.int64),
        length=torch.tensor(aligned.lengths, dtype=torch.int64),
        schedule_start=torch.tensor(starts[:-1], dtype=torch.int64),
        schedule=torch.tensor(list(itertools.chain(*plan.slots)), dtype=torch.int32),
    )
    return call
