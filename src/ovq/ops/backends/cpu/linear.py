"""Products of activations with a weight matrix, where PyTorch's library is not the fastest.

With a few tokens, as in decoding, the time is that of reading the matrix, which PyTorch's library does at
half the speed of memory. On AMD's processors, it neither uses AVX-512 nor keeps the multiply-add units busy;
the kernel of linear.h does both. Below `_MANY_TOKENS`, oneDNN of PyTorch has the faster forward.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.compiler import cpu_lines, processor_features
from ovq.ops.backends.cpu.tokens import call_kernel, can_run
from ovq.ops.first_order import first_order

#: Maximum number of vectors multiplied in one pass over the matrix.
FEW_TOKENS = 4
# Number of tokens from which it pays to copy a matrix into the order in which the kernel reads its transpose.
_MANY_TOKENS = 512


def few_products(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T` for at most `FEW_TOKENS` vectors x `[..., D]`, weight `[V, D]`, without a gradient."""
    x, weight = x.contiguous(), weight.contiguous()
    num_out, dim = weight.shape
    y = x.new_empty(*x.shape[:-1], num_out)
    call_kernel("ovq_linear", torch.get_num_threads(), x.numel() // dim, dim, num_out, x, weight, y)
    return y


@functools.cache
def has_faster_products() -> bool:
    """Whether the kernel is faster than PyTorch's library: on AMD; on others it has not been measured.

    Example:
        >>> has_faster_products() == any("AuthenticAMD" in line for line in cpu_lines("vendor_id"))
        True
    """
    return any("AuthenticAMD" in line for line in cpu_lines("vendor_id"))


@functools.cache
def _has_faster_library() -> bool:
    """Whether oneDNN is available and uses instructions that the library of `torch.mm` does not."""
    has_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_onednn and has_faster_products() and "avx512f" in processor_features()


def product(a: Tensor, b: Tensor, *, added_to: Tensor | None = None) -> Tensor:
    """The matrix product `a b`, without a gradient, by the kernel where it is faster, else by PyTorch.

    Args:
        a: `[M, K]`. b: `[K, N]`.
        added_to: `[M, N]`, to which the product is added in place.

    Returns:
        `[M, N]`: `added_to`, if it is given.
    """
    is_here = has_faster_products() and can_run(a, b) and not torch.is_autocast_enabled("cpu")
    is_dense = added_to is None or added_to.is_contiguous()
    if not (is_here and is_dense) or 0 in (*a.shape, *b.shape):
        return a @ b if added_to is None else added_to.addmm_(a, b)
    a, b = (x if 1 in x.stride() else x.contiguous() for x in (a, b))
    (m, k), n, threads = a.shape, b.shape[1], torch.get_num_threads()
    c = a.new_empty(m, n) if added_to is None else added_to
    scratch = a.new_empty(_scratch_of(threads, n))
    strides_a, strides_b = a.stride(), b.stride()
    call_kernel(
        "ovq_matmul", threads, m, n, k, a, *strides_a, b, *strides_b, int(added_to is not None), c, scratch
    )
    return c


@functools.cache
def _scratch_of(threads: int, num_columns: int) -> int:
    """Floats of scratch that the kernel needs."""
    function = build.load().ovq_matmul_scratch
    function.argtypes, function.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return function(threads, num_columns)


class FasterLinear(torch.autograd.Function):
    """`x weight^T` of x `[..., D]` and weight `[V, D]`, and both gradients, by the fastest product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """`[..., V]`."""
        ctx.save_for_backward(x, weight)
        return _linear(x, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that are needed."""
        return _linear_gradients(grad, *ctx.saved_tensors, *ctx.needs_input_grad)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    tokens = x.flatten(0, -2)
    if len(tokens) >= _MANY_TOKENS:
        y = product(tokens, weight.t())
    elif _has_faster_library():
        y = torch.ops.mkldnn._linear_pointwise(tokens, weight, None, "none", [], "")
    else:
        return F.linear(x, weight)
    # For PyTorch no view, as hooks and adapters could not change one from here in place.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], len(weight)))


def _linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wants_x: bool = True, wants_weight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    of_tokens = grad.flatten(0, -2)
    of_x = product(of_tokens, weight).view(x.shape) if wants_x else None
    of_weight = product(of_tokens.t(), x.flatten(0, -2)) if wants_weight else None
    return of_x, of_weight


def _linear_of_any(x: Tensor, weight: Tensor) -> Tensor:
    if x.numel() <= FEW_TOKENS * x.shape[-1] and can_run(x, weight):
        return few_products(x, weight)
    return _linear(x, weight)


def _fake_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


# `x weight^T` by the fastest product, with gradients, as an operator in graphs of `torch.compile`. Registered
# without `torch.library.custom_op`, which loads the compiler.
_LIBRARY = torch.library.Library("ovq", "FRAGMENT")
_LIBRARY.define("linear(Tensor x, Tensor weight) -> Tensor")
_LIBRARY.define("linear_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)")
_LIBRARY.impl("linear", _linear_of_any, "CompositeExplicitAutograd")
_LIBRARY.impl("linear_backward", _linear_gradients, "CompositeExplicitAutograd")
torch.library.register_fake(
    "ovq::linear", lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=_LIBRARY
)
torch.library.register_fake("ovq::linear_backward", _fake_gradients, lib=_LIBRARY)
torch.library.register_autograd(
    "ovq::linear",
    lambda ctx, grad: torch.ops.ovq.linear_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    lib=_LIBRARY,
)
