"""Calls with several tokens per row or with gradients: prepares a call and runs the kernels on its chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.backends.dictionary import Dictionary, dense_copy
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.triton.launch import Saved, backward, forward
from ovq.ops.backends.triton.ward import Gone
from ovq.ops.backends.triton.work import Work


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    count: Tensor,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`chunk_attention` of the `torch` backend, run by the kernels; arguments and results are the same."""
    return _ChunkAttention.apply(q, k, v, scale, key_sum, value_sum, count, plan)


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        key_sum: Tensor,
        value_sum: Tensor,
        count: Tensor,
        plan: Plan,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, scale = (x.contiguous() for x in (q, k, v, scale))
        sums = Dictionary(key_sum, value_sum, count).clone()
        num_chunks, width, num_heads, _ = q.shape
        lse = torch.zeros(num_chunks, num_heads, width, dtype=torch.float32, device=q.device)
        slots = torch.zeros(num_chunks, k.shape[2], width, dtype=torch.int32, device=q.device)
        ctx.work = Work(plan, count.shape[2], q.device)
        # Slots merged into others cannot be taken out again without what was in them.
        gone = None
        if plan.options.merges_pairs and any(ctx.needs_input_grad):
            gone = Gone.empty(ctx.work, k, v, is_kept=True)
        o = forward(q, k, v, scale, lse, slots, sums, ctx.work, gone)
        ctx.save_for_backward(
            q, k, v, scale, o, lse, slots, sums.key_sum, sums.value_sum, sums.count,
            *([] if gone is None else gone.tensors()),
        )  # fmt: skip
        ctx.mark_non_differentiable(sums.count)
        ctx.set_materialize_grads(False)
        return o, sums.key_sum, sums.value_sum, sums.count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_o: Tensor | None,
        grad_key_sum: Tensor | None,
        grad_value_sum: Tensor | None,
        _: None,
    ) -> tuple[Tensor | None, ...]:
        q, k, v, scale, o, lse, slots, key_sum, value_sum, count, *parts = ctx.saved_tensors
        saved = Saved(q, k, v, scale, o, lse, slots, Gone(*parts) if parts else None)
        final = Dictionary(key_sum, value_sum, count)
        grad_o = torch.zeros_like(saved.o) if grad_o is None else grad_o.contiguous()
        grads = Dictionary(
            torch.zeros_like(key_sum) if grad_key_sum is None else dense_copy(grad_key_sum),
            torch.zeros_like(value_sum) if grad_value_sum is None else dense_copy(grad_value_sum),
            count,
        )
        tokens = backward(saved, grad_o, final.clone(), grads, ctx.work)
        return *tokens, grads.key_sum, grads.value_sum, None, None
