"""Transforms of PyTorch: which are active, and why a backend cannot run under them."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active.

    Kernels read the plain numbers of tensors, so they would lose tangents without an error.

    Example:
        >>> is_transformed(), torch.func.grad(lambda x: x * is_transformed())(torch.tensor(2.0))
        (False, tensor(1.))
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refused_transform(*, is_plain: bool) -> str | None:
    """Why a backend cannot run under the active transforms; None if it can.

    Args:
        is_plain: whether the backend computes in PyTorch's own operations, which have derivatives.

    Example:
        >>> torch.func.vmap(lambda x: print(refused_transform(is_plain=True)) or x)(torch.ones(2)).tolist()
        expected no torch.func.vmap, found one
        [1.0, 1.0]
    """
    if not is_transformed():
        return None
    if torch._C._are_functorch_transforms_active():
        functorch = torch._C._functorch
        if any(each.key() == functorch.TransformType.Vmap for each in functorch.get_interpreter_stack()):
            # No value of a tensor can be read, so no slot can be chosen.
            return "expected no torch.func.vmap, found one"
    if is_plain:
        return None
    return "expected no transform of torch.func and no forward-mode differentiation, found one"
