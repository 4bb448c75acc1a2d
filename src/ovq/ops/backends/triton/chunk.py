"""Calls with several tokens per row or with gradients: prepares a call and runs the kernels on its chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.triton.launch import Saved, backward, forward
from ovq.ops.backends.triton.merging import Gone
from ovq.ops.backends.triton.weights import Kept, Weights
from ovq.ops.backends.triton.work import Work


class ChunkAttention(torch.autograd.Function):
    """`ChunkAttention` of the `torch` backend, run by the kernels; arguments and results are the same."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, weights: Any, *of_sums: Any
    ) -> tuple[Tensor | None, ...]:
        """Run the chunks of all rows."""
        q, k, v, scale = (x.contiguous() for x in (q, k, v, scale))
        sums = Dictionary(*of_sums).clone()
        num_chunks, width, num_heads, _ = q.shape
        lse = torch.zeros(num_chunks, num_heads, width, dtype=torch.float32, device=q.device)
        slots = torch.zeros(num_chunks, k.shape[2], width, dtype=torch.int32, device=q.device)
        ctx.work = Work(plan, sums.count.shape[2], q.device)
        has_backward = any(ctx.needs_input_grad)
        kept = gone = None
        if weights is not None:
            kept = Kept.empty(ctx.work, k, v) if has_backward else None
            weights = Weights(weights.squeeze(-1).contiguous(), kept, plan.options.weighs_chunk)
        # Slots merged into others cannot be taken out again without what was in them.
        if plan.options.merges_pairs and has_backward:
            gone = Gone.empty(ctx.work, k, v, is_kept=True, has_weights=weights is not None)
        o = forward(q, k, v, scale, lse, slots, sums, ctx.work, gone, weights)
        ctx.save_for_backward(
            q, k, v, scale, o, lse, slots, *sums.tensors, None if weights is None else weights.tokens,
            *([None] * 4 if kept is None else kept), *(gone or ()),
        )  # fmt: skip
        ctx.mark_non_differentiable(sums.count)
        ctx.set_materialize_grads(False)
        return o, *sums.tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor | None, *grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        """Rewind the chunks of all rows."""
        q, k, v, scale, o, lse, slots, *parts = ctx.saved_tensors
        final, (tokens, *parts) = Dictionary(*parts[:4]), parts[4:]
        is_read = ctx.work.options.weighs_chunk
        weights = None if tokens is None else Weights(tokens, Kept(*parts[:4]), is_read)
        saved = Saved(q, k, v, scale, o, lse, slots, Gone(*parts[4:]) if parts[4:] else None, weights)
        grad_o = torch.zeros_like(o) if grad_o is None else grad_o.contiguous()
        grads = final.gradients(grad_sums)
        *of_inputs, of_tokens = backward(saved, grad_o, final.clone(), grads, ctx.work)
        of_tokens = None if of_tokens is None else of_tokens[..., None]
        return None, *of_inputs, of_tokens, grads.key_sum, grads.value_sum, None, grads.weight
