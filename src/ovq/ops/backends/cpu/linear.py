"""Products of activations with a weight matrix, where PyTorch's library is not the fastest that there is.

A few tokens, as in decoding, only have to read the matrix, which PyTorch's library does at half the speed of
memory. And on AMD's processors it does not use AVX-512; oneDNN, which comes with PyTorch as well, does.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.backends.cpu.compiler import cpu_lines, processor_features
from ovq.ops.backends.cpu.tokens import call_kernel

#: The most vectors that are multiplied while the matrix passes by.
FEW_TOKENS = 4


def few_products(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T` for at most `FEW_TOKENS` vectors x `[..., D]`, weight `[V, D]`, without a gradient."""
    x, weight = x.contiguous(), weight.contiguous()
    num_out, dim = weight.shape
    y = x.new_empty(*x.shape[:-1], num_out)
    call_kernel("ovq_linear", torch.get_num_threads(), x.numel() // dim, dim, num_out, x, weight, y)
    return y


@functools.cache
def has_faster_library() -> bool:
    """Whether oneDNN is here and uses instructions that the library of `torch.mm` leaves unused."""
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    is_amd = any("AuthenticAMD" in line for line in cpu_lines("vendor_id"))
    return has_onednn and is_amd and "avx512f" in processor_features()


class FasterLinear(torch.autograd.Function):
    """`x weight^T` of x `[..., D]` by oneDNN, and the gradient of x.

    `torch.mm` makes that of the weight, for which oneDNN was no faster where this was measured.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """`[..., V]`."""
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are needed."""
        x, weight = ctx.saved_tensors
        of_x = _onednn(grad, weight.t()) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return of_x, of_weight


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def mlp_step(x: Tensor, norm: Tensor, eps: float, gate_up: Tensor, down: Tensor) -> Tensor:
    """`x + down(swiglu(gate_up(norm(x))))` for at most `FEW_TOKENS` vectors x `[..., D]`, without a gradient.

    Norm is the weight `[D]` of an RMS norm; gate_up `[2 I, D]` and down `[D, I]` are dense.
    """
    x = x.contiguous()
    dim, inner = down.shape
    num = x.numel() // dim
    y, scratch = torch.empty_like(x), x.new_empty(num * (dim + 3 * inner + 1))
    threads = torch.get_num_threads()
    call_kernel("ovq_mlp_step", threads, num, dim, inner, float(eps), x, norm, gate_up, down, scratch, y)
    return y
