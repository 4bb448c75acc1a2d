"""`ChunkAttention` in Triton, for calls with several tokens per row or with gradients."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.triton import common
from ovq.ops.backends.triton.merging import MergedSlots
from ovq.ops.backends.triton.passes import BackwardPass, Saved, Snapshots, recurrence_of, snapshot_bytes
from ovq.ops.backends.triton.read import read
from ovq.ops.backends.triton.weights import ChangedSlots, Weights
from ovq.ops.backends.triton.work import Work
from ovq.ops.first_order import first_order, saved_tensors


class ChunkAttention(torch.autograd.Function):
    """`ChunkAttention` of the `torch` backend in Triton kernels, with the same arguments and results."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, weights: Any, *of_sums: Any
    ) -> tuple[Tensor | None, ...]:
        """Run the chunks of all rows."""
        q, k, v, scale = (x.contiguous() for x in (q, k, v, scale))
        sums = Dictionary(*of_sums).clone()
        num_chunks, width, num_heads, dim = q.shape
        # log2-sum-exp2 of each query's scores, and the slot of each token of a complete chunk.
        lse = torch.zeros(num_chunks, num_heads, width, dtype=torch.float32, device=q.device)
        slots = torch.zeros(num_chunks, k.shape[2], width, dtype=torch.int32, device=q.device)
        ctx.work = Work(plan, sums.count.shape[2], q.device)
        has_backward = any(ctx.needs_input_grad)
        kept = merged = None
        if weights is not None:
            kept = ChangedSlots.empty(ctx.work, k, v) if has_backward else None
            weights = Weights(weights.squeeze(-1).contiguous(), kept, plan.options.weighs_chunk)
        # The backward needs the contents of slots merged into others to take them out again.
        if plan.options.merges_pairs and has_backward:
            merged = MergedSlots.empty(ctx.work, k, v, is_kept=True, has_weights=weights is not None)
        work, o = ctx.work, q.new_empty(*q.shape[:3], v.shape[-1])
        recurrence = recurrence_of(k, v, slots, sums, work, merged, weights)
        own_bias = None if weights is None else weights.own_bias
        segments = work.segments(snapshot_bytes(k, v))
        snapshots = Snapshots.empty(max(work.entries(s) for s in segments), work, k, v)
        blocks = common.read_blocks(q, v)
        query_blocks = triton.cdiv(width, blocks["BM"])
        # Triton launches on the current device, even if the tensors are on another.
        with torch.cuda.device_of(q):
            for segment in segments:
                first = work.first[segment.start]
                for i in segment:
                    recurrence.step(i, snapshots, first)
                read[(work.entries(segment) * query_blocks, num_heads)](
                    q, k, v, scale, work.table, *snapshots, own_bias, o, lse, first,
                    width, num_heads, num_heads // work.num_kv_heads, dim, v.shape[-1], work.capacity,
                    query_blocks, BK=common.padded(dim), BV=common.padded(v.shape[-1]), **blocks,
                    **common.FUSED,
                )  # fmt: skip
            recurrence.step(work.num_steps)
        ctx.save_for_backward(
            q, k, v, scale, o, lse, slots, *sums.tensors, None if weights is None else weights.tokens,
            *([None] * 4 if kept is None else kept), *(merged or ()),
        )  # fmt: skip
        ctx.mark_non_differentiable(sums.count)
        ctx.set_materialize_grads(False)
        return o, *sums.tensors

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_o: Tensor | None, *grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        """Rewind the chunks of all rows."""
        q, k, v, scale, o, lse, slots, *parts = saved_tensors(ctx)
        final, (tokens, *parts) = Dictionary(*parts[:4]), parts[4:]
        is_read = ctx.work.options.weighs_chunk
        weights = None if tokens is None else Weights(tokens, ChangedSlots(*parts[:4]), is_read)
        saved = Saved(q, k, v, scale, o, lse, slots, MergedSlots(*parts[4:]) if parts[4:] else None, weights)
        grad_o = torch.zeros_like(o) if grad_o is None else grad_o.contiguous()
        grads = final.gradients(grad_sums)
        of_inputs = BackwardPass(saved, grad_o, final.clone(), grads, ctx.work).run()
        return None, *of_inputs, grads.key_sum, grads.value_sum, None, grads.weight
