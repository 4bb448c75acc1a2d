"""Calls with several tokens per row or with gradients: prepares a call and runs the kernels on its chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.backends.dictionary import Dictionary, dense_copy
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.triton.launch import Saved, backward, forward
from ovq.ops.backends.triton.merging import Gone
from ovq.ops.backends.triton.weights import Kept, Weights
from ovq.ops.backends.triton.work import Work


class ChunkAttention(torch.autograd.Function):
    """`ChunkAttention` of the `torch` backend, run by the kernels; arguments and results are the same."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        key_sum: Tensor,
        value_sum: Tensor,
        count: Tensor,
        token_weights: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Run the chunks of all rows."""
        q, k, v, scale = (x.contiguous() for x in (q, k, v, scale))
        sums = Dictionary(key_sum, value_sum, count, weight).clone()
        num_chunks, width, num_heads, _ = q.shape
        lse = torch.zeros(num_chunks, num_heads, width, dtype=torch.float32, device=q.device)
        slots = torch.zeros(num_chunks, k.shape[2], width, dtype=torch.int32, device=q.device)
        ctx.work = Work(plan, count.shape[2], q.device)
        has_backward = any(ctx.needs_input_grad)
        weights = kept = gone = None
        if token_weights is not None:
            kept = Kept.empty(ctx.work, k, v) if has_backward else None
            weights = Weights(token_weights.squeeze(-1).contiguous(), kept, plan.options.weighs_chunk)
        # Slots merged into others cannot be taken out again without what was in them.
        if plan.options.merges_pairs and has_backward:
            gone = Gone.empty(ctx.work, k, v, is_kept=True, has_weights=weights is not None)
        o = forward(q, k, v, scale, lse, slots, sums, ctx.work, gone, weights)
        ctx.save_for_backward(
            q, k, v, scale, o, lse, slots, sums.key_sum, sums.value_sum, sums.count, sums.weight,
            None if weights is None else weights.tokens,
            *([None] * 4 if kept is None else kept.tensors()),
            *([] if gone is None else gone.tensors()),
        )  # fmt: skip
        ctx.mark_non_differentiable(sums.count)
        ctx.set_materialize_grads(False)
        return o, sums.key_sum, sums.value_sum, sums.count, sums.weight

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_o: Tensor | None,
        grad_key_sum: Tensor | None,
        grad_value_sum: Tensor | None,
        _: None,
        grad_weight: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Rewind the chunks of all rows."""
        q, k, v, scale, o, lse, slots, *parts = ctx.saved_tensors
        key_sum, value_sum, count, weight, tokens, *parts = parts
        is_read = ctx.work.options.weighs_chunk
        weights = None if tokens is None else Weights(tokens, Kept(*parts[:4]), is_read)
        saved = Saved(q, k, v, scale, o, lse, slots, Gone(*parts[4:]) if parts[4:] else None, weights)
        final = Dictionary(key_sum, value_sum, count, weight)
        grad_o = torch.zeros_like(saved.o) if grad_o is None else grad_o.contiguous()
        grads = Dictionary(
            torch.zeros_like(key_sum) if grad_key_sum is None else dense_copy(grad_key_sum),
            torch.zeros_like(value_sum) if grad_value_sum is None else dense_copy(grad_value_sum),
            count,
        )
        if weight is not None:
            grads.weight = torch.zeros_like(weight) if grad_weight is None else dense_copy(grad_weight)
        *of_inputs, of_tokens = backward(saved, grad_o, final.clone(), grads, ctx.work)
        of_tokens = None if of_tokens is None else of_tokens[..., None]
        return None, *of_inputs, grads.key_sum, grads.value_sum, None, of_tokens, grads.weight
