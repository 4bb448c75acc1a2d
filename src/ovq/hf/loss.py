"""The loss of a language model in pieces, so that the logits of all tokens never exist at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from ovq.layers.products import Linear, is_plain
from ovq.ops.backends.cpu.linear import product
from ovq.ops.first_order import first_order
from ovq.ops.transforms import is_transformed

# Logits per piece, and its fewest tokens, as each piece reads and writes the gradient of the output layer.
_PIECE, _ROWS = 1 << 21, 256


def can_be_pieced(head: nn.Module, loss_function: Callable[..., Tensor]) -> bool:
    """Whether the loss is transformers' causal LM loss and the output layer a plain matrix product.

    An output layer with hooks, an adapter or quantized weights must be called once, on all tokens. Transforms
    of `torch.func` do not know the gradient of the pieces.
    """
    return (
        # transformers makes the latter when it resizes the vocabulary.
        (is_plain(head, Linear) or is_plain(head, nn.Linear))
        and head.bias is None
        and type(head.weight) in (nn.Parameter, Tensor)
        # Set by DeepSpeed, which shards weights.
        and not hasattr(head.weight, "ds_id")
        and loss_function is ForCausalLMLoss
        and not torch.compiler.is_compiling()
        and not is_transformed()
    )


def loss_in_pieces(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Mean cross-entropy of the logits `hidden_states weight^T`, computed in pieces with its gradient.

    Args:
        hidden_states: `[N, D]`.
        weight: `[V, D]`.
        targets: `[N]` token ids.
        num_items_in_batch: divisor of the summed loss; None for N.

    Returns:
        A scalar in float32 (float64 for float64). Memory is O((N + V) D) and does not depend on N V.
    """
    total = _SummedLoss.apply(hidden_states, weight, targets, torch.is_grad_enabled())
    if num_items_in_batch is None:
        num_items_in_batch = len(targets)
        if not num_items_in_batch:
            # The mean over no tokens is NaN; its gradients are zero.
            return total + torch.nan
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


class _SummedLoss(torch.autograd.Function):
    """Summed loss. Gradients are computed in the forward, while the logits of a piece exist."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, weight: Tensor, targets: Tensor, has_graph: bool) -> Tensor:
        wants = [has_graph and needed for needed in ctx.needs_input_grad[:2]]
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        total = hidden_states.new_zeros((), dtype=wide)
        of_hidden = torch.empty_like(hidden_states) if wants[0] else None
        # Sums over many tokens, which a loss scale and the mean make smaller only later, overflow in float16.
        of_weight = torch.zeros_like(weight, dtype=_wider(weight.dtype)) if wants[1] else None
        size = max(_ROWS, _PIECE // len(weight))
        for start in range(0, len(targets), size):
            piece, target = hidden_states[start : start + size], targets[start : start + size, None]
            # In the autocast dtype, if autocast is on.
            logits = product(piece, weight.t())
            narrow = logits.dtype
            log_probs = torch.log_softmax(logits.to(wide), -1)
            del logits
            total -= log_probs.gather(1, target).sum()
            if not any(wants):
                continue
            grad = log_probs.exp_()
            grad.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            grad = grad.to(narrow)
            if of_hidden is not None:
                of_hidden[start : start + size] = product(grad, weight.to(narrow))
            if of_weight is None:
                continue
            left, right = (x.to(_wider(narrow)) for x in (grad.t(), piece.to(narrow)))
            if left.dtype == of_weight.dtype:
                product(left, right, added_to=of_weight)
            else:
                of_weight += left @ right
        ctx.save_for_backward(of_hidden, of_weight)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        return (
            None if of_hidden is None else of_hidden * grad.to(of_hidden.dtype),
            None if of_weight is None else of_weight * grad.to(of_weight.dtype),
            None,
            None,
        )


def _wider(dtype: torch.dtype) -> torch.dtype:
    """float32 for float16."""
    return torch.float32 if dtype == torch.float16 else dtype
