"""The short convolution in compiled code: one pass over the tokens forward, one backward."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.mirrors import MIRRORS
from ovq.ops.backends.cpu.tokens import call_kernel
from ovq.ops.first_order import first_order, saved_tensors


class CompiledConvolution(torch.autograd.Function):
    """Causal depthwise convolution of x `[B, T, D]` to the same shape.

    Past `[B, C - 1, D]` holds the tokens before the first; None stands for zeros. The last tap of weight `[D,
    C]` belongs to the token itself. Offset `[T]` int64 is the number of tokens before each token in its own
    packed row.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, past: Tensor | None, weight: Tensor, offset: Tensor | None) -> Tensor:
        """Convolve in one pass over the tokens."""
        x, taps = x.contiguous(), weight.t().contiguous()
        past = None if past is None else past.contiguous()
        y = torch.empty_like(x)
        _run("ovq_convolution_forward", x=x, past=past, taps=taps, offset=offset, y=y)
        ctx.save_for_backward(x, past, taps, offset)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Compute all gradients in one pass over the tokens."""
        x, past, taps, offset = saved_tensors(ctx)
        grad_x, grad_past = torch.empty_like(x), None if past is None else torch.empty_like(past)
        grad_taps = taps.new_zeros(x.shape[0], *taps.shape)
        _run(
            "ovq_convolution_backward",
            x=x,
            past=past,
            taps=taps,
            offset=offset,
            grad_y=grad_y.contiguous(),
            grad_x=grad_x,
            grad_past=grad_past,
            grad_taps=grad_taps,
        )
        return grad_x, grad_past, grad_taps.sum(0).t(), None


def _run(name: str, *, x: Tensor, taps: Tensor, **others: Tensor | None) -> None:
    call = MIRRORS["Convolution"](*x.shape, len(taps), torch.get_num_threads())
    call.point(x=x, taps=taps, **others)
    getattr(build.load(), name)(ctypes.byref(call))


def convolution_step(x: Tensor, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution of one token x `[B, 1, D]` per row, and the state after it, without a gradient.

    The state `[B, D, C - 1]` holds the inputs before; weight is `[D, C]`.
    """
    x, state, weight = x.contiguous(), state.contiguous(), weight.contiguous()
    y, last = torch.empty_like(x), torch.empty_like(state)
    num_channels, num_taps = weight.shape
    call_kernel("ovq_convolution_step", len(x), num_channels, num_taps, x, state, weight, y, last)
    return y, last
