"""The kernels as functions of tensors: what `chunk.py` does group by group, for all streams in one call."""

from __future__ import annotations

import ctypes
import itertools

import torch
from torch import Tensor

from ovq.ops.cpu import build
from ovq.ops.groups import Plan
from ovq.ops.novelty import random_priority
from ovq.ops.rules import TIE

_DTYPES = (torch.float32, torch.bfloat16)


def cpu_kernels() -> str:
    """Whether the `torch` backend runs compiled kernels on this CPU, and if not, why.

    Example:
        >>> cpu_kernels().startswith(("compiled", "not available"))
        True
    """
    try:
        build.load()
    except build.Unavailable as error:
        return f"not available: {error}"
    return "compiled for this processor"


def can_run(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> bool:
    """Whether the kernels take these tensors: float32 or bfloat16 on a CPU, and a compiler was found."""
    fits = q.device.type == "cpu" and q.dtype in _DTYPES and q.dtype == k.dtype == v.dtype
    return fits and scale.dtype == torch.float32 and _is_available()


def _is_available() -> bool:
    try:
        build.load()
    except build.Unavailable:
        return False
    return True


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    count: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read and learn all chunks; the sums `[R, Hkv, M, ...]` and counts are brought up to date in place.

    Args:
        q: `[num_chunks, W, H, K]`. k: `[num_chunks, W, Hkv, K]`. v: `[num_chunks, W, Hkv, V]`.
        scale: `[H]`.
        key_sum: `[R, Hkv, M, K]`, contiguous like the next two.
        value_sum: `[R, Hkv, M, V]`.
        count: `[R, Hkv, M]`.
        plan: the work to do.

    Returns:
        Outputs `[num_chunks, W, H, V]`, the log-sum-exp of each query `[num_chunks, W, H]`, and the slot of
        each token of a complete chunk `[num_chunks, W, Hkv]`, int32.
    """
    q, k, v = (_dense(x) for x in (q, k, v))
    o = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    lse = torch.empty(q.shape[:3])
    slots = torch.zeros(k.shape[:3], dtype=torch.int32)
    call = _call(q, k, v, o, lse, scale, key_sum, value_sum, count, slots, plan)
    if plan.rules.init == "random":
        call.point(priority=_priorities(plan))
    call.run("ovq_forward")
    return o, lse, slots


def chunk_backward(
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
    grad_o: Tensor,
    key_deposit: Tensor,
    value_deposit: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and scale.

    The sums and counts at the end of the forward are rewound in place to those at its start, and the deposits
    `[R, Hkv, M, ...]`, the gradient of the former, become that of the latter. Other arguments are those, or
    the results, of `chunk_forward`.
    """
    q, k, v, grad_o = (_dense(x) for x in (q, k, v, grad_o))
    call = _call(q, k, v, o, lse, scale, key_sum, value_sum, count, slots, plan)
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)]
    grad_scale = torch.zeros(len(plan.slots), q.shape[2], dtype=torch.float64)
    call.set_tokens(grad_o=grad_o, grad_q=grads[0], grad_k=grads[1], grad_v=grads[2])
    call.point(key_deposit=key_deposit, value_deposit=value_deposit, grad_scale=grad_scale)
    call.run("ovq_backward")
    return *grads, grad_scale.sum(0).to(scale.dtype)


def _dense(x: Tensor) -> Tensor:
    """`x` with vectors that lie in one piece each."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _priorities(plan: Plan) -> Tensor:
    """`[chunks, Hkv, C]`: the random ranks of each chunk's keys, an unused chunk after each row's last."""
    size, rows = plan.rules.chunk_size, []
    for merged, sizes in zip(plan.num_merged, plan.slots, strict=True):
        for i in range(len(sizes)):
            seen = merged + (i + 1) * size
            rows += [random_priority(plan.rules.seed, h, seen, size) for h in range(plan.num_kv_heads)]
    return torch.stack(rows)


class _Tokens(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3), ("dim", ctypes.c_int64)]


class _Call(ctypes.Structure):
    """`Call` of call.h, field by field; keeps what it points to alive."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_rows", "num_kv_heads", "group_size", "chunk_size")),
        *((name, ctypes.c_int64) for name in ("width", "capacity", "num_threads")),
        *((name, ctypes.c_int64) for name in ("is_bfloat16", "is_merge_updated")),
        ("tie", ctypes.c_double),
        *((name, _Tokens) for name in ("q", "k", "v", "o")),
        *((name, ctypes.c_void_p) for name in ("lse", "scale", "key_sum", "value_sum", "count", "slots")),
        *((name, ctypes.c_void_p) for name in ("first_chunk", "length", "schedule_start", "schedule")),
        ("priority", ctypes.c_void_p),
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
) -> _Call:
    rules, aligned = plan.rules, plan.aligned
    call = _Call(
        num_rows=len(plan.slots),
        num_kv_heads=plan.num_kv_heads,
        group_size=plan.group_size,
        chunk_size=rules.chunk_size,
        width=aligned.width,
        capacity=key_sum.shape[2],
        num_threads=torch.get_num_threads(),
        is_bfloat16=q.dtype == torch.bfloat16,
        is_merge_updated=rules.merge == "updated",
        tie=TIE,
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
