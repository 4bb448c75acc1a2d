"""Sliding-window attention in compiled code: only scores within windows are computed, and none are kept."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.kernels import dense
from ovq.ops.backends.cpu.mirrors import MIRRORS, Mirror
from ovq.ops.first_order import first_order, saved_tensors


class CompiledWindow(torch.autograd.Function):
    """Softmax attention of q `[B, T, H, K]` over the window of each query in k, v `[B, S, Hkv, ...]`.

    The last T of the S keys are the queries' own. Scale `[H]` is the factor on the logits of each head. First
    `[B, T]` int64 is the first key that a query may see and must not decrease from one query to the next;
    None for 0.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor | None, window: int
    ) -> Tensor:
        """`[B, T, H, V]`."""
        q, k, v = map(dense, (q, k, v))
        o = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1])
        scale = scale.contiguous()
        tensors = (q, k, v, scale, first, o, lse)
        build.load().ovq_window_forward(ctypes.byref(_call(window, *tensors)))
        ctx.save_for_backward(*tensors)
        ctx.window = window
        return o

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        """Scores are computed again, block by block."""
        q, k, v, scale, first, o, lse = saved_tensors(ctx)
        grad_o = dense(grad_o)
        (num_rows, num_keys, num_kv_heads, _), lanes = k.shape, build.load().ovq_lanes()
        grad_q = q.new_empty(q.shape)
        grad_k, grad_v = (
            x.new_zeros(num_rows, num_kv_heads, num_keys, -(-x.shape[3] // lanes) * lanes) for x in (k, v)
        )
        grad_scale = scale.new_zeros(num_rows, q.shape[2], dtype=torch.float64)
        call = _call(ctx.window, q, k, v, scale, first, o, lse)
        call.grad_o, call.grad_q = _strided(grad_o), _strided(grad_q)
        call.point(grad_k=grad_k, grad_v=grad_v, grad_scale=grad_scale)
        build.load().ovq_window_backward(ctypes.byref(call))
        grad_k, grad_v = grad_k[..., : k.shape[3]].transpose(1, 2), grad_v[..., : v.shape[3]].transpose(1, 2)
        return grad_q, grad_k, grad_v, grad_scale.sum(0).to(scale.dtype), None, None


def _strided(x: Tensor) -> Mirror:
    """`[B, T, heads, dim]`, each vector dense."""
    return MIRRORS["Strided"](x.data_ptr(), *x.stride()[:3])


def _call(
    window: int, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor | None, o: Tensor, lse: Tensor
) -> Mirror:
    """Arguments of a forward; the caller keeps q, k, v and o alive."""
    num_rows, num_tokens, num_heads, dim = q.shape
    sizes = (num_rows, num_tokens, k.shape[1], num_heads, k.shape[2], dim, v.shape[3], window)
    call = MIRRORS["Window"](torch.get_num_threads(), *sizes)
    call.point(scale=scale, first=first, lse=lse)
    call.q, call.k, call.v, call.o = map(_strided, (q, k, v, o))
    return call
