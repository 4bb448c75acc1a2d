"""`Linear`: the projections of all layers, with fast products on CPUs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.ops.backends.cpu.linear import FEW_TOKENS, FasterLinear, few_products, has_faster_products
from ovq.ops.backends.cpu.tokens import can_run
from ovq.ops.transforms import is_differentiated

# Determined on import, as `torch.compile` cannot trace the detection of the processor.
_HAS_FASTER_PRODUCTS = has_faster_products()


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module runs the `forward` of its class.

    accelerate replaces it on instances. transformers sets it there, too, to that of the class where it has no
    faster kernel for the device.

    Example:
        >>> silu, other = nn.SiLU(), nn.SiLU()
        >>> other.forward = lambda x: x
        >>> has_own_forward(silu), has_own_forward(other)
        (True, False)
    """
    forward = vars(module).get("forward")
    return forward is None or forward == type(module).forward.__get__(module)


def is_plain(module: nn.Module, kind: type[nn.Module], allowed_hooks: str = "") -> bool:
    """Whether a module is exactly a `kind`, without hooks or replaced `forward`, so a kernel may replace it.

    `allowed_hooks` is the Python module of forward hooks that do not count.

    Example:
        >>> is_plain(nn.SiLU(), nn.SiLU), is_plain(nn.SiLU(), nn.Linear)
        (True, False)
    """
    if type(module) is not kind:
        return False
    own = vars(module)
    # Hooks of other libraries may read or change inputs and outputs. No loop: decoding runs this for every
    # module and token.
    hooks = own["_forward_hooks"]
    if hooks and allowed_hooks:
        hooks = [hook for hook in hooks.values() if getattr(hook, "__module__", "") != allowed_hooks]
    has_hooks = hooks or own["_forward_pre_hooks"]
    has_hooks = has_hooks or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not has_hooks and has_own_forward(module)


def plain_parameter(module: nn.Module, kind: type[nn.Module], name: str = "weight") -> Tensor | None:
    """A contiguous parameter of a module that `is_plain`, without a bias; None if there is no such.

    Example:
        >>> plain_parameter(nn.Linear(2, 3, bias=False), nn.Linear).shape
        torch.Size([3, 2])
        >>> plain_parameter(nn.Linear(2, 3), nn.Linear)
    """
    if not is_plain(module, kind) or module._parameters.get("bias") is not None:
        return None
    found = module._parameters.get(name)
    return found if found is not None and found.is_contiguous() else None


def can_multiply(x: Tensor, *weights: Tensor) -> bool:
    """Whether kernels may compute the product: float32 on a CPU, no autocast (which reduces precision), and
    plain parameters (sharding and quantization replace them)."""
    if not can_run(x, *weights) or torch.is_autocast_enabled("cpu"):
        return False
    return all(type(weight) is nn.Parameter for weight in weights)


def _is_of_kernels(x: Tensor, weight: Tensor) -> bool:
    """`can_multiply` while `torch.compile` traces."""
    is_narrow = x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    return x.is_cpu and weight.is_cpu and not is_narrow


class Linear(nn.Linear):
    """`torch.nn.Linear` without bias unless one is assigned, by the fastest available product on a CPU."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if self.bias is not None or x.shape[-1:] != self.weight.shape[1:]:
            # PyTorch says what is wrong with a shape; a kernel would read beyond the input.
            return F.linear(x, self.weight, self.bias)
        if can_multiply(x, self.weight):
            has_graph = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
            num = math.prod(x.shape[:-1])
            if not has_graph and num <= FEW_TOKENS:
                return few_products(x, self.weight)
            if num > FEW_TOKENS and has_faster_products():
                return FasterLinear.apply(x, self.weight)
        is_in_graph = torch.compiler.is_compiling() and not is_differentiated()
        if _HAS_FASTER_PRODUCTS and is_in_graph and _is_of_kernels(x, self.weight):
            return torch.ops.ovq.linear(x, self.weight)
        return F.linear(x, self.weight)
