"""What backward functions of kernels share: they cannot be differentiated again, and read dense tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ovq.ops.uncompiled import uncompiled


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`backward` of an autograd function that raises an error for `create_graph=True`.

    `torch.compile` leaves it alone: in a step compiled whole it would trace it even for parts run eagerly.

    PyTorch's `once_differentiable` raises only if the incoming gradient requires a gradient itself. The
    gradient of a sum of outputs does not, so a gradient penalty would silently have no effect.

    Raises:
        RuntimeError: from `backward`, if called with `create_graph=True` or `is_grads_batched=True`.
    """

    @uncompiled
    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            refuse_second_order()
        if any(isinstance(g, torch.Tensor) and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads):
            raise RuntimeError(
                "expected is_grads_batched=False, found True: kernels take one gradient at a time"
            )
        return backward(ctx, *grads)

    return refusing


def refuse_second_order(*_: Any) -> NoReturn:
    """Raise RuntimeError; also as the backward of an operator that is itself a backward."""
    raise RuntimeError(
        "expected create_graph=False, found True: kernels and graphs of torch.compile and torch.export give "
        "no gradients of gradients. Outside of graphs, ovq_attention does with backend='naive'; layers "
        "also need OVQ_CPU_KERNELS=0, models skip_logits=False and, for softmax attention, "
        "sdpa_kernel(SDPBackend.MATH) of PyTorch"
    )


def saved_tensors(ctx: Any) -> list[Any]:
    """The tensors, or None, that a forward saved, each contiguous; to be read once, as checkpoints demand.

    Hooks (`torch.autograd.graph.saved_tensors_hooks`) may return them with other strides than they had.
    """
    return [None if x is None else x.contiguous() for x in ctx.saved_tensors]
