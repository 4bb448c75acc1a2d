"""Sliding-window attention in compiled code: only scores within windows are computed, and none are kept."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.mirrors import mirror_of


class CompiledWindow(torch.autograd.Function):
    """Softmax attention of q `[B, T, H, K]` over the window of each query in k, v `[B, S, Hkv, ...]`.

    The last T of the S keys are the queries' own. Scale `[H]` is the factor on the logits of each head. First
    `[B, T]` int64 is the first key that a query may see, which never falls from one query to the next; None
    if that is the first of all.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor | None, window: int
    ) -> Tensor:
        """`[B, T, H, V]`."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        o = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        scale = scale.contiguous()
        call = _Window.of(q, k, v, scale, first, window, o, lse)
        build.load().ovq_window_forward(ctypes.byref(call))
        ctx.save_for_backward(q, k, v, scale, first, o, lse)
        ctx.window = window
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        """Scores are computed again, block by block."""
        q, k, v, scale, first, o, lse = ctx.saved_tensors
        grad_o = grad_o if grad_o.stride(-1) == 1 else grad_o.contiguous()
        (num_rows, num_keys, num_kv_heads, _), lanes = k.shape, build.load().ovq_lanes()
        grad_q = q.new_empty(q.shape)
        grad_k, grad_v = (
            x.new_zeros(num_rows, num_kv_heads, num_keys, -(-x.shape[3] // lanes) * lanes) for x in (k, v)
        )
        grad_scale = scale.new_zeros(num_rows, q.shape[2], dtype=torch.float64)
        call = _Window.of(q, k, v, scale, first, ctx.window, o, lse)
        call.grad_o, call.grad_q = _Strided.of(grad_o), _Strided.of(grad_q)
        call.grad_k, call.grad_v = grad_k.data_ptr(), grad_v.data_ptr()
        call.grad_scale = grad_scale.data_ptr()
        build.load().ovq_window_backward(ctypes.byref(call))
        grad_k, grad_v = grad_k[..., : k.shape[3]].transpose(1, 2), grad_v[..., : v.shape[3]].transpose(1, 2)
        return grad_q, grad_k, grad_v, grad_scale.sum(0).to(scale.dtype), None, None


@mirror_of("Strided")
class _Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "token", "head"))]

    @classmethod
    def of(cls, x: Tensor) -> _Strided:
        """`[B, T, heads, dim]`, each vector dense."""
        return cls(x.data_ptr(), *x.stride()[:3])


@mirror_of("Window")
class _Window(ctypes.Structure):
    """`Window` of window.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_threads", "num_rows", "num_tokens", "num_keys")),
        *((name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "key_dim", "value_dim", "window")),
        *((name, ctypes.c_void_p) for name in ("scale", "first")),
        *((name, _Strided) for name in ("q", "k", "v", "o")),
        ("lse", ctypes.c_void_p),
        *((name, _Strided) for name in ("grad_o", "grad_q")),
        *((name, ctypes.c_void_p) for name in ("grad_k", "grad_v", "grad_scale")),
    ]

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        first: Tensor | None,
        window: int,
        o: Tensor,
        lse: Tensor,
    ) -> _Window:
        """The call of a forward; the caller keeps the tensors alive."""
        num_rows, num_tokens, num_heads, dim = q.shape
        return cls(
            torch.get_num_threads(),
            num_rows,
            num_tokens,
            k.shape[1],
            num_heads,
            k.shape[2],
            dim,
            v.shape[3],
            window,
            scale.data_ptr(),
            None if first is None else first.data_ptr(),
            *(_Strided.of(x) for x in (q, k, v, o)),
            lse.data_ptr(),
        )
