"""Transforms and modes of PyTorch: which are active, and which ones calls and backends cannot run under."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is active.

    Kernels read the plain numbers of tensors, so they would lose tangents without an error.

    Example:
        >>> is_transformed(), torch.func.grad(lambda x: x * is_transformed())(torch.tensor(2.0))
        (False, tensor(1.))
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether a `TorchDispatchMode` is active, such as `FlopCounterMode` or one of selective checkpoints.

    Modes see no kernels. Those of checkpoints may also return a result of the first run in place of a new
    tensor, which kernels would then change. Of any checkpoint, a mode must see both runs or neither: they
    save different tensors, so PyTorch raises a CheckpointError.

    Example:
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> with FlopCounterMode(display=False):
        ...     is_watched()
        True
    """
    return torch._C._len_torch_dispatch_stack() > 0


def needs_operations() -> bool:
    """Whether PyTorch's own operations must run in place of kernels: `is_transformed` or `is_watched`."""
    return is_transformed() or is_watched()


def is_differentiated() -> bool:
    """Whether `torch.func.grad` or forward-mode differentiation is active.

    Operators of graphs have no derivatives under them; under `torch.func.vmap` alone they run.

    Example:
        >>> is_differentiated(), torch.func.grad(lambda x: x * is_differentiated())(torch.tensor(2.0))
        (False, tensor(1.))
    """
    if forward_ad._current_level >= 0:
        return True
    functorch = torch._C._functorch
    # The stack cannot be read without transforms.
    stack = functorch.get_interpreter_stack() if torch._C._are_functorch_transforms_active() else []
    return any(each.key() != functorch.TransformType.Vmap for each in stack)


# As by `torch.compiler.assume_constant_result`, which loads the compiler: graphs are traced anew for others.
is_differentiated._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take any


def have_tangents(*tensors: Tensor | None) -> bool:
    """Whether forward-mode derivatives, or a transform of `torch.func`, may go through the tensors."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def check_transforms() -> None:
    """Raise ValueError under `vmap`, `linearize` and `functionalize` of `torch.func` and `torch.jit.trace`.

    There no value or size of a tensor can be read, so no slot can be chosen.

    Example:
        >>> torch.func.vmap(lambda x: check_transforms() or x)(torch.ones(2))
        Traceback (most recent call last):
        ValueError: expected no torch.func.vmap, found one
    """
    if torch.jit.is_tracing():
        raise ValueError("expected no torch.jit.trace, found one: torch.export and torch.compile can do it")
    proxy = torch._C._TorchDispatchModeKey.PROXY
    # The second is that of pre_dispatch=True.
    if torch._C._get_dispatch_mode(proxy) or torch._ops._get_dispatch_mode_pre_dispatch(proxy):
        raise ValueError("expected no make_fx (or torch.func.linearize), found one: torch.export can do it")
    if torch._C._are_functorch_transforms_active():
        functorch = torch._C._functorch
        for each in functorch.get_interpreter_stack():
            if (key := each.key()) in (functorch.TransformType.Vmap, functorch.TransformType.Functionalize):
                raise ValueError(f"expected no torch.func.{key.name.lower()}, found one")


def refused_mode() -> str | None:
    """Why a backend of kernels cannot run under the active `TorchDispatchMode`; None without one."""
    if not is_watched():
        return None
    found = type(_get_current_dispatch_mode()).__name__
    return f"expected no TorchDispatchMode, which sees no kernels, found {found}"


def refused_transform(*, is_plain: bool) -> str | None:
    """Why a backend cannot run under the active transforms; None if it can.

    Args:
        is_plain: whether the backend computes in PyTorch's own operations, which have derivatives.
    """
    if is_plain or not is_transformed():
        return None
    return "expected no transform of torch.func and no forward-mode differentiation, found one"
