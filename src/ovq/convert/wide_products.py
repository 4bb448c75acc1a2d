"""Products of weights in 16 bits, in float32 where a processor is faster at those.

Without AMX, a processor may multiply bfloat16 at half the speed of float32. `wide_products` widens both
factors for one product at a time, so that weights take no more memory. Either way, sums are float32.
"""

from __future__ import annotations

import contextlib
import functools
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ovq.ops.backends.cpu.linear import product

# Tokens, inputs and outputs of the products that are timed.
_SIZES = 512, 576, 1536


def wide_products(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Context manager in which the linear layers of a model multiply in float32 if that is faster.

    Gradients reach inputs alone. Activations keep their dtype.

    Example:
        >>> linear = nn.Linear(8, 4, dtype=torch.bfloat16)
        >>> with wide_products(linear):
        ...     linear(torch.ones(2, 8, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    x = next(model.parameters())
    is_wide = x.is_cpu and x.dtype in (torch.bfloat16, torch.float16) and _is_faster_wide(x.dtype)
    return _WideProducts() if is_wide else contextlib.nullcontext()


@functools.cache
def _is_faster_wide(dtype: torch.dtype) -> bool:
    """Whether float32 products, with factors of `dtype` widened first, take less time here."""
    tokens, dim, num_out = _SIZES
    x, weight = (torch.ones(num, dim, dtype=dtype, device="cpu") for num in (tokens, num_out))
    return _seconds(lambda: _wide(x, weight.t())) < _seconds(lambda: F.linear(x, weight))


def _seconds(function: Callable[[], object]) -> float:
    """The least time of three calls, after one that is not timed."""
    return min(timeit.repeat(function, number=1, repeat=4)[1:])


def _wide(a: Tensor, b: Tensor) -> Tensor:
    return product(a.float(), b.float()).to(a.dtype)


class _WideProducts(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # How `nn.Linear` calls it.
        if func is F.linear and len(args) == 3 and args[1].dtype in (torch.bfloat16, torch.float16):
            x, weight, bias = args
            y = _WideLinear.apply(x, weight)
            return y if bias is None else y + bias
        return func(*args, **(kwargs or {}))


class _WideLinear(torch.autograd.Function):
    """`x weight^T` of x `[..., D]` and weight `[V, D]`, and the gradient of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _wide(x.flatten(0, -2), weight.t()).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return _wide(grad.flatten(0, -2), weight).view(*grad.shape[:-1], weight.shape[1]), None
