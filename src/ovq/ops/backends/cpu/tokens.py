"""Per-token operations of layers (RMS norm, SwiGLU, heads), in one pass over memory each.

PyTorch's own operations take five to ten passes for the same, which is most of a layer's time outside of its
matrix products.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.kernels import is_available
from ovq.ops.backends.cpu.mirrors import MIRRORS
from ovq.ops.checks import is_memory
from ovq.ops.first_order import first_order, saved_tensors
from ovq.ops.transforms import needs_operations


def can_run(*tensors: Tensor) -> bool:
    """Whether the kernels can run: float32 on a CPU, compiled kernels, no tracing, transforms or modes."""
    for x in tensors:
        if x.dtype != torch.float32 or not x.is_cpu or not is_memory(x):
            return False
    # While a model is traced, sizes are tensors.
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not is_traced and not needs_operations() and is_available()


# Stands in for an autograd context where no gradient is wanted, and keeps nothing.
_NO_CONTEXT = SimpleNamespace(save_for_backward=lambda *tensors: None)


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, or its forward alone where no graph is made, which saves a decode step some time."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NO_CONTEXT, *arguments)


def call_kernel(name: str, *arguments: float | Tensor) -> int:
    """Call a function with integers, floats and addresses of dense tensors; return what it returns."""
    function = getattr(build.load(), name)
    if function.argtypes is None:
        # Addresses are integers of as many bytes.
        function.argtypes = [ctypes.c_float if isinstance(x, float) else ctypes.c_int64 for x in arguments]
    return function(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])


class CompiledRMSNorm(torch.autograd.Function):
    """`x / rms(x) * weight` of x `[..., D]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise each vector."""
        x, weight = x.contiguous(), weight.contiguous()
        dim = weight.numel()
        num = x.numel() // dim
        y, rates = torch.empty_like(x), x.new_empty(num)
        threads = torch.get_num_threads()
        call_kernel("ovq_rms_norm", threads, num, dim, float(eps), x, weight, y, rates)
        ctx.save_for_backward(x, weight, rates)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Both gradients in one pass."""
        x, weight, rates = saved_tensors(ctx)
        threads, dim = torch.get_num_threads(), weight.numel()
        grad_x, grad_weight = torch.empty_like(x), x.new_zeros(threads, dim)
        tensors = (x, weight, rates, grad_y.contiguous(), grad_x, grad_weight)
        call_kernel("ovq_rms_norm_backward", threads, rates.numel(), dim, *tensors)
        return grad_x, grad_weight.sum(0), None


class CompiledSwiGLU(torch.autograd.Function):
    """`silu(gate) * up` of `[..., 2 D]`, in which `gate` is the first half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """One pass; nothing but the input is kept for the backward."""
        x = x.contiguous()
        dim = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], dim)
        call_kernel("ovq_swiglu", torch.get_num_threads(), x.numel() // (2 * dim), dim, x, y)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_y: Tensor) -> Tensor:
        """The gradient of both halves in one pass."""
        (x,) = saved_tensors(ctx)
        grad_x, dim = torch.empty_like(x), x.shape[-1] // 2
        num = x.numel() // (2 * dim)
        call_kernel("ovq_swiglu_backward", torch.get_num_threads(), num, dim, x, grad_y.contiguous(), grad_x)
        return grad_x


class CompiledHeads(torch.autograd.Function):
    """Queries, keys and values of channels `[B, T, (H + 2 Hkv) K]`; queries and keys have length 1.

    The tables `[T, K / 2]` of cosines and sines rotate queries and keys; None leaves them as they are.
    """

    @staticmethod
    def forward(
        ctx: Any, channels: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, num_kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[B, T, H, K]`, `[B, T, Hkv, K]`, `[B, T, Hkv, K]`."""
        channels = channels.contiguous()
        *shape, width = channels.shape
        dim = width // (num_heads + 2 * num_kv_heads)
        q = channels.new_empty(*shape, num_heads, dim)
        k, v = (channels.new_empty(*shape, num_kv_heads, dim) for _ in range(2))
        rates = channels.new_empty(*shape, num_heads + num_kv_heads)
        _run("ovq_heads", channels=channels, q=q, k=k, v=v, rates=rates, cos=cos, sin=sin)
        # What the backward needs of the channels is in the queries and keys, which attention keeps anyway.
        ctx.save_for_backward(q, k, rates, cos, sin)
        return q, k, v

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the channels in one pass."""
        q, k, rates, cos, sin = saved_tensors(ctx)
        grad_q, grad_k, grad_v = (grad.contiguous() for grad in grads)
        grad = q.new_empty(*q.shape[:2], (q.shape[2] + 2 * k.shape[2]) * q.shape[3])
        given = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v, "grad_channels": grad}
        _run("ovq_heads_backward", q=q, k=k, rates=rates, cos=cos, sin=sin, **given)
        return grad, None, None, None, None


def _run(name: str, *, q: Tensor, k: Tensor, **others: Tensor | None) -> None:
    call = MIRRORS["Heads"](torch.get_num_threads(), *q.shape[:3], k.shape[2], q.shape[3])
    call.point(q=q, k=k, **others)
    getattr(build.load(), name)(ctypes.byref(call))
