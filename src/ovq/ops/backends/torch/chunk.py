"""The `torch` backend: chunk by chunk in large matrix products, with a backward in O(T) memory.

For each chunk of a group of streams, the forward (1) computes attention, one softmax over
[chunk | dictionary]; (2) assigns the tokens to slots; (3) adds them to the sums of these slots.

The backward needs only the slot of each token. It walks the chunks in reverse and *rewinds* the dictionary:
with fixed assignments, the sums are linear in keys and values, so subtracting a chunk restores the dictionary
that its queries read, and the gradient of the sums only accumulates (`docs/method/math.md`, section 4).
Probabilities are recomputed, which is faster than storing and loading them.

The `cpu` backend does the same in compiled code, several times as fast.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.torch.merge import ChangedSlots, merge_chunk
from ovq.ops.backends.torch.read import Reader
from ovq.ops.backends.torch.route import Router
from ovq.ops.backends.torch.streams import Group, Step, groups_of
from ovq.ops.first_order import first_order, saved_tensors
from ovq.ops.options import LEAST_READ


class ChunkAttention(torch.autograd.Function):
    """OVQ attention over chunk-aligned rows.

    Args:
        plan: the work to do.
        q: `[num_chunks, W, H, K]` queries, chunk-aligned (`AlignedRows.align`).
        k: `[num_chunks, W, Hkv, K]` keys.
        v: `[num_chunks, W, Hkv, V]` values.
        scale: `[H]` in the dtype of the sums.
        weights: `[num_chunks, W, Hkv, 1]` token weights; None: all are 1.
        of_sums: tensors of the initial `Dictionary` `[R, Hkv, M, ...]`, M = `plan.capacity`, rows in sorted
            order.

    Returns:
        Outputs `[num_chunks, W, H, V]`, and the tensors of the final dictionary.
    """

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, weights: Any, *of_sums: Any
    ) -> tuple[Tensor | None, ...]:
        """Run all groups of streams."""
        sums = Dictionary(*of_sums).clone()
        o = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        # Slot of every token of a complete chunk; int32 is enough for any dictionary.
        slots = torch.zeros(*k.shape[:3], 1, dtype=torch.int32, device=k.device)
        inputs = _Inputs(q, k, v, scale, weights)
        kept = [_forward_group(group, inputs, sums, o, slots) for group in groups_of(plan, q.device)]
        parts = [part for steps in kept for each in steps for part in each]
        ctx.save_for_backward(q, k, v, scale, weights, o, slots, *sums.tensors, *parts)
        ctx.plan, ctx.num_kept = plan, [len(steps) for steps in kept]
        ctx.mark_non_differentiable(sums.count)
        ctx.set_materialize_grads(False)
        return o, *sums.tensors

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_o: Tensor | None, *grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        """Rewind all groups of streams."""
        tensors = saved_tensors(ctx)
        (*inputs, o, slots), final, parts = tensors[:7], Dictionary(*tensors[7:11]), iter(tensors[11:])
        saved = _Saved(*inputs, o=o, grad_o=torch.zeros_like(o) if grad_o is None else grad_o, slots=slots)
        grads = _Inputs(*map(_zeros_like, inputs))
        # Gradient A of the sums: at first of the final state, at the end of the initial state.
        deposits = final.gradients(grad_sums)
        # Autocast would reduce the precision of these products below that of the forward.
        with torch.autocast(o.device.type, enabled=False):
            for group, num in zip(groups_of(ctx.plan, o.device), ctx.num_kept, strict=True):
                kept = [ChangedSlots(*itertools.islice(parts, len(ChangedSlots._fields))) for _ in range(num)]
                _Backward(group, saved, final, deposits, grads).run(kept)
        of_sums = (deposits.key_sum, deposits.value_sum, None, deposits.weight)
        return None, grads.q, grads.k, grads.v, grads.scale, grads.token_weights, *of_sums


def _zeros_like(x: Any) -> Any:
    return None if x is None else torch.zeros_like(x)


@dataclasses.dataclass
class _Inputs:
    """Differentiable inputs of a call, or their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor
    token_weights: Tensor | None


@dataclasses.dataclass(kw_only=True)
class _Saved(_Inputs):
    """Inputs of the backward: also the outputs, their gradient, and the slot of each token."""

    o: Tensor
    grad_o: Tensor
    slots: Tensor


def _forward_group(
    group: Group, inputs: _Inputs, sums: Dictionary, o: Tensor, slots: Tensor
) -> list[ChangedSlots]:
    """Run all chunks of a group in order; fills `o` and `slots` and updates `sums` in place.

    Returns what the backward needs to undo the merges of the chunks, beyond the slots of tokens.
    """
    sums, options, most = group.dictionary(sums), group.plan.options, group.plan.capacity
    kept: list[ChangedSlots] = []
    has_weights = inputs.token_weights is not None
    reader = Reader(group, inputs.q, inputs.v, sums.key_sum.dtype, has_weights=has_weights)
    router = Router(num_streams=group.num_streams, max_slots=most, options=options, like=sums.key_sum)
    for step in group.steps():
        reader.load(step, inputs.k, inputs.v, sums, inputs.token_weights)
        for block in step.blocks:
            step.put(o, reader.read(step, block, inputs.q, inputs.scale), block)
        if step.num_complete:
            chunk = step.complete_chunk(inputs.k, inputs.v, inputs.token_weights, sums.key_sum.dtype)
            chosen, parts = merge_chunk(sums, chunk, options, router, reader.means)
            step.put_complete(slots, chosen[..., None])
            kept += [] if parts is None else [parts]
    return kept


class _Backward:
    """Backward of a group: all its chunks, in reverse.

    Args:
        final: the final dictionaries.
        deposits: gradient of the sums, updated in place.
        grads: gradients of the inputs, filled in.
    """

    def __init__(
        self, group: Group, saved: _Saved, final: Dictionary, deposits: Dictionary, grads: _Inputs
    ) -> None:
        self._group, self._saved, self._grads = group, saved, grads
        self._sums, self._deposits = group.dictionary(final).clone(), group.dictionary(deposits)
        self._wide = final.key_sum.dtype
        has_weights = saved.token_weights is not None
        self._reader = Reader(group, saved.q, saved.v, self._wide, has_weights=has_weights)

    def run(self, kept: list[ChangedSlots]) -> None:
        """Run all chunks; `kept` is the result of `_forward_group`."""
        saved, grads = self._saved, self._grads
        for step in reversed(self._group.steps()):
            # Gradient of the step's tokens, both as candidates of its queries and as terms of the sums.
            grad_k = self._sums.key_sum.new_zeros(step.num_streams, step.num_tokens, saved.k.shape[-1])
            grad_v = self._sums.key_sum.new_zeros(step.num_streams, step.num_tokens, saved.v.shape[-1])
            grad_w = None
            if saved.token_weights is not None:
                grad_w = self._sums.key_sum.new_zeros(step.num_streams, step.num_tokens)
            if step.num_complete:
                self._take_back(step, kept, grad_k, grad_v, grad_w)
            # 3. Backward of the read from the dictionary that the chunk's queries saw.
            self._reader.load(step, saved.k, saved.v, self._sums, saved.token_weights)
            for block in step.blocks:
                self._block(step, block, grad_k, grad_v, grad_w)
            step.put(grads.k, grad_k, step.tokens)
            step.put(grads.v, grad_v, step.tokens)
            if grad_w is not None:
                assert grads.token_weights is not None
                step.put(grads.token_weights, grad_w[..., None], step.tokens)

    def _take_back(
        self,
        step: Step,
        kept: list[ChangedSlots],
        grad_k: Tensor,
        grad_v: Tensor,
        grad_w: Tensor | None,
    ) -> None:
        """Undo the merge of a step's complete chunks; adds the gradients of their tokens through the sums to
        `grad_k`, `grad_v` and `grad_w`."""
        saved, sums, deposits, s = self._saved, self._sums, self._deposits, step.num_complete
        chunk = step.complete_chunk(saved.k, saved.v, saved.token_weights, sums.key_sum.dtype)
        # 1. The tokens of the chunk get the gradient of the sums that they were added to.
        chosen = step.take(saved.slots)[:s].squeeze(-1).long()
        index = sums.index(chosen)
        own_k = deposits.key_sum.view(-1, grad_k.shape[-1])[index].view_as(chunk.keys)
        own_v = deposits.value_sum.view(-1, grad_v.shape[-1])[index].view_as(chunk.values)
        if chunk.weights is None:
            grad_k[:s] += own_k
            grad_v[:s] += own_v
        else:
            assert deposits.weight is not None
            assert grad_w is not None
            grad_k[:s] += chunk.weights[..., None] * own_k
            grad_v[:s] += chunk.weights[..., None] * own_v
            grad_w[:s] += (own_k * chunk.keys).sum(-1) + (own_v * chunk.values).sum(-1)
            grad_w[:s] += deposits.weight.view(-1)[index].view(s, -1)
        # 2. Rewind to the dictionary before the chunk, clearing the slots that it opened.
        if chunk.weights is None:
            sums.add_(chosen, chunk.keys, chunk.values, -1)
        if kept:
            kept.pop().restore_(sums, deposits)
        is_unused = (sums.count[:s] == 0).unsqueeze(-1)
        for x in (sums.key_sum, sums.value_sum, deposits.key_sum, deposits.value_sum):
            x[:s].masked_fill_(is_unused, 0)
        if deposits.weight is not None:
            deposits.weight[:s].masked_fill_(is_unused[..., 0], 0)

    def _block(self, step: Step, block: slice, grad_k: Tensor, grad_v: Tensor, grad_w: Tensor | None) -> None:
        """Backward of the read of one block; adds the gradients of its candidates to the buffers."""
        saved, grads, reader, wide = self._saved, self._grads, self._reader, self._wide
        probs = reader.attend(step, block, saved.q, saved.scale)
        grad_o = step.part(saved.grad_o, block).reshape(step.num_streams, -1, saved.v.shape[-1])
        o = step.part(saved.o, block).reshape_as(grad_o)
        grad_values = torch.bmm(probs.transpose(1, 2), grad_o)
        # sum(P dP) = sum(o do).
        inner = (o.to(wide) * grad_o.to(wide)).sum(-1, keepdim=True)
        grad_scores, wide_scores = reader.grad_scores(step, block, grad_o, inner)
        grad_keys = torch.bmm(grad_scores.transpose(1, 2), reader.queries)
        queries = step.part(saved.q, block)
        # The scores are products with scale * q.
        by_head = torch.bmm(grad_scores, reader.keys(step, block)).to(wide).view(queries.shape)
        grads.scale[step.query_heads] += (by_head * queries.to(wide)).sum((0, 2, 3))
        grad_queries = by_head * saved.scale[step.query_heads, None, None]
        step.put(grads.q, grad_queries.view(step.num_streams, -1, saved.q.shape[-1]), block)
        if self._group.plan.options.ablation.bias == "count+norm":
            _backward_norms(step, block, reader, saved.scale, grads.scale, wide_scores, grad_keys)
        for tokens in step.blocks:
            if tokens.start < block.stop:
                rows = slice(block.stop - tokens.stop, block.stop - tokens.start)
                grad_k[:, tokens] += grad_keys[:, rows]
                grad_v[:, tokens] += grad_values[:, rows]
                if grad_w is not None and self._group.plan.options.weighs_chunk:
                    # A token's score includes the log of its weight.
                    assert saved.token_weights is not None
                    weights = step.take(saved.token_weights)[:, tokens, 0]
                    of_scores = wide_scores[..., rows].sum(1, dtype=wide) / weights.clamp(min=LEAST_READ)
                    grad_w[:, tokens] += of_scores.masked_fill(weights < LEAST_READ, 0)
        slots = slice(block.stop, block.stop + step.num_slots)
        of_keys, of_values = grad_keys[:, slots].to(wide), grad_values[:, slots].to(wide)
        self._deposit(step, of_keys, of_values, wide_scores[..., slots])

    def _deposit(self, step: Step, of_keys: Tensor, of_values: Tensor, of_scores: Tensor) -> None:
        """Add gradients of the means and scores of a block's slots to the gradients of sums and weights."""
        s, n, reader, deposits = step.num_streams, step.num_slots, self._reader, self._deposits
        deposits.key_sum[:s, :n].addcdiv_(of_keys, reader.mass)
        deposits.value_sum[:s, :n].addcdiv_(of_values, reader.mass)
        if deposits.weight is None:
            return
        # The weight of a slot is in its score, log weight, and divides its sums.
        of_weight = of_scores.sum(1, dtype=self._wide)
        of_weight -= (of_keys * reader.means[:, :n]).sum(-1)
        values = self._sums.value_sum[:s, :n] / reader.mass
        of_weight -= (of_values * values).sum(-1)
        of_weight = (of_weight / reader.mass[..., 0]).masked_fill(reader.is_empty[..., 0], 0)
        deposits.weight[:s, :n] += of_weight


def _backward_norms(
    step: Step,
    block: slice,
    reader: Reader,
    scale: Tensor,
    grad_scale: Tensor,
    grad_scores: Tensor,
    grad_keys: Tensor,
) -> None:
    """Add the gradients of the score term -scale |D|^2 / 2 to the gradients of the scale and the keys."""
    scales, wide = step.scales(scale), grad_scale.dtype
    by_slot = grad_scores.view(*scales.shape, -1, grad_scores.shape[-1]).sum(2, dtype=wide)
    grad_scales = (by_slot * reader.half_norms(step, block)[:, None]).sum(-1)
    grad_scale[step.query_heads] -= (
        grad_scales.view(-1, len(step.group.heads), scales.shape[1]).sum(0).view(-1)
    )
    weights = (by_slot * scales[..., None]).sum(1)[..., None]
    grad_keys -= (weights * reader.keys(step, block)).to(grad_keys.dtype)
