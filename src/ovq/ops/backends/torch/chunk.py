"""The `torch` backend: chunk by chunk in large matrix products, with a backward in O(T) memory.

For each chunk of a group of streams, the forward (1) reads: one softmax over [chunk | dictionary]; (2) routes
the chunk's keys; (3) adds them to the sums of their slots.

The only thing that the backward keeps per chunk is the slot of each token. It walks the chunks in reverse and
*rewinds* the dictionary: with the assignments fixed, the sums are linear in the keys and values, so
subtracting a chunk gives the dictionary that its queries read, and the gradient of the sums only accumulates
(`docs/math.md`). Probabilities are computed again, which is faster than storing and reading them back.

The `cpu` backend does the same in compiled code, several times as fast.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.backends.dictionary import Dictionary, dense_copy
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.torch.merge import MergedSlots, learn_by_likelihood, part_slots
from ovq.ops.backends.torch.read import Reader
from ovq.ops.backends.torch.route import Router
from ovq.ops.backends.torch.streams import Group, Step, groups_of


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
    """OVQ attention over chunk-aligned rows.

    Args:
        q: `[num_chunks, W, H, K]` queries, chunk-aligned (`AlignedRows.align`).
        k: `[num_chunks, W, Hkv, K]` keys.
        v: `[num_chunks, W, Hkv, V]` values.
        scale: `[H]` in the dtype of the sums.
        key_sum: `[R, Hkv, M, K]` sums at the start, M = `plan.capacity`, rows in sorted order.
        value_sum: `[R, Hkv, M, V]`.
        count: `[R, Hkv, M]`.
        plan: the work to do.

    Returns:
        Outputs `[num_chunks, W, H, V]`, and the sums and counts at the end.
    """
    return _ChunkAttention.apply(q, k, v, scale, key_sum, value_sum, count, plan)


_MERGED = dataclasses.fields(MergedSlots)


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
        sums = Dictionary(key_sum, value_sum, count).clone()
        o = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        # The slot of every token of a complete chunk; int32 is enough for any dictionary.
        slots = torch.zeros(*k.shape[:3], 1, dtype=torch.int32, device=k.device)
        merged = [
            _forward_group(group, q, k, v, scale, sums, o, slots) for group in groups_of(plan, q.device)
        ]
        parts = [getattr(each, f.name) for steps in merged for each in steps for f in _MERGED]
        ctx.save_for_backward(q, k, v, scale, o, sums.key_sum, sums.value_sum, sums.count, slots, *parts)
        ctx.plan, ctx.num_merged = plan, [len(steps) for steps in merged]
        ctx.mark_non_differentiable(sums.count)
        ctx.set_materialize_grads(False)
        return o, sums.key_sum, sums.value_sum, sums.count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_o: Tensor | None, grad_key_sum: Tensor | None, grad_value_sum: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, scale, o, key_sum, value_sum, count, slots, *saved = ctx.saved_tensors
        parts = iter(saved)
        call = _Saved(q, k, v, scale, o, torch.zeros_like(o) if grad_o is None else grad_o, slots)
        grads = _Inputs(
            torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.zeros_like(scale)
        )
        final = Dictionary(key_sum, value_sum, count)
        # A: the gradient of the sums. It starts as that of the final state and ends as that of the initial
        # one.
        deposits = Dictionary(
            torch.zeros_like(key_sum) if grad_key_sum is None else dense_copy(grad_key_sum),
            torch.zeros_like(value_sum) if grad_value_sum is None else dense_copy(grad_value_sum),
            count,
        )
        # Autocast would run these products with less precision than the forward.
        with torch.autocast(q.device.type, enabled=False):
            for group, num in zip(groups_of(ctx.plan, q.device), ctx.num_merged, strict=True):
                merged = [MergedSlots(*(next(parts) for _ in _MERGED)) for _ in range(num)]
                _backward_group(group, call, final, deposits, grads, merged)
        return grads.q, grads.k, grads.v, grads.scale, deposits.key_sum, deposits.value_sum, None, None


@dataclasses.dataclass
class _Inputs:
    """The tensors of a call, or their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor


@dataclasses.dataclass
class _Saved(_Inputs):
    """What the backward starts from: also the outputs, their gradient, and the slot of each token."""

    o: Tensor
    grad_o: Tensor
    slots: Tensor


def _forward_group(
    group: Group, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, sums: Dictionary, o: Tensor, slots: Tensor
) -> list[MergedSlots]:
    """Run all chunks of a group, in order; fills `o` and `slots` and updates `sums` in place.

    Returns what each complete chunk merged of slots: nothing but by the rules that merge pairs.
    """
    sums = group.dictionary(sums)
    merged: list[MergedSlots] = []
    reader = Reader(group, q, v, sums.key_sum.dtype)
    router = Router(
        num_streams=group.num_streams,
        max_slots=group.plan.capacity,
        options=group.plan.options,
        like=sums.key_sum,
    )
    for step in group.steps():
        reader.load(step, k, v, sums)
        for block in step.blocks:
            step.put(o, reader.read(step, block, q, scale), block)
        s = step.num_complete
        if s and group.plan.options.merges_pairs:
            keys, values = reader.chunk_keys[:s], reader.chunk_values[:s]
            chosen, parts = learn_by_likelihood(
                sums, keys, values, step.before[:s], step.after, group.plan.options
            )
            merged.append(parts)
            step.put_complete(slots, chosen[..., None])
        elif s:
            chosen = router(
                reader.chunk_keys[:s],
                reader.means[:s],
                step.before[:s],
                step.after,
                heads=step.heads,
                num_seen=step.num_seen,
            )
            sums.add_(chosen, reader.chunk_keys[:s], reader.chunk_values[:s], 1)
            step.put_complete(slots, chosen[..., None])
    return merged


def _backward_group(
    group: Group,
    call: _Saved,
    final: Dictionary,
    deposits: Dictionary,
    grads: _Inputs,
    merged: list[MergedSlots],
) -> None:
    """Run all chunks of a group, in reverse; fills the gradients of tokens and updates `deposits` in
    place."""
    sums, deposits = group.dictionary(final).clone(), group.dictionary(deposits)
    reader = Reader(group, call.q, call.v, sums.key_sum.dtype)
    for step in reversed(group.steps()):
        # The gradient of the step's tokens, both as candidates of its queries and as parts of the sums.
        grad_k = sums.key_sum.new_zeros(step.num_streams, step.num_tokens, call.k.shape[-1])
        grad_v = sums.key_sum.new_zeros(step.num_streams, step.num_tokens, call.v.shape[-1])
        s = step.num_complete
        if s:
            # 1. The tokens of the chunk get the gradient of the sums that they were added to.
            chosen = step.take(call.slots)[:s].squeeze(-1).long()
            index = sums.index(chosen)
            grad_k[:s] = deposits.key_sum.view(-1, grad_k.shape[-1])[index].view_as(grad_k[:s])
            grad_v[:s] = deposits.value_sum.view(-1, grad_v.shape[-1])[index].view_as(grad_v[:s])
            # 2. Rewind to the dictionary that the chunk's queries saw, without the slots that the chunk
            # opened.
            keys, values = step.take(call.k)[:s], step.take(call.v)[:s]
            sums.add_(chosen, keys.to(sums.key_sum.dtype), values.to(sums.key_sum.dtype), -1)
            is_gone = (sums.count[:s] == 0).unsqueeze(-1)
            for x in (sums.key_sum, sums.value_sum, deposits.key_sum, deposits.value_sum):
                x[:s].masked_fill_(is_gone, 0)
            if merged:
                part_slots(sums, deposits, merged.pop())
        # 3. Backward of the read from that dictionary.
        reader.load(step, call.k, call.v, sums)
        for block in step.blocks:
            _backward_block(step, block, reader, call, deposits, grads, grad_k, grad_v)
        step.put(grads.k, grad_k, step.tokens)
        step.put(grads.v, grad_v, step.tokens)


def _backward_block(
    step: Step,
    block: slice,
    reader: Reader,
    call: _Saved,
    deposits: Dictionary,
    grads: _Inputs,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Gradients of one block's softmax; those of its candidates are added to the buffers for them."""
    wide = deposits.key_sum.dtype
    probs = reader.attend(step, block, call.q, call.scale)
    grad_scores, _ = reader.scratch(step, block)
    grad_o = step.part(call.grad_o, block).reshape(step.num_streams, -1, call.v.shape[-1])
    o = step.part(call.o, block).reshape_as(grad_o)
    grad_values = torch.bmm(probs.transpose(1, 2), grad_o)
    # dS = P (dP - sum(P dP)), and sum(P dP) = sum(o do).
    inner = (o.to(wide) * grad_o.to(wide)).sum(-1, keepdim=True)
    torch.bmm(grad_o, reader.values(step, block).transpose(1, 2), out=grad_scores)
    grad_scores.sub_(inner.to(grad_scores.dtype)).mul_(probs)
    grad_keys = torch.bmm(grad_scores.transpose(1, 2), reader.queries)
    grad_queries = torch.bmm(grad_scores, reader.keys(step, block)).to(wide)
    if step.group.plan.options.bias == "count+norm":
        _backward_norms(step, block, reader, call, grads, grad_scores, grad_keys)
    for tokens in step.blocks:
        if tokens.start < block.stop:
            rows = slice(block.stop - tokens.stop, block.stop - tokens.start)
            grad_k[:, tokens] += grad_keys[:, rows]
            grad_v[:, tokens] += grad_values[:, rows]
    s, n = step.num_streams, step.num_slots
    slots = slice(block.stop, block.stop + n)
    deposits.key_sum[:s, :n].addcdiv_(grad_keys[:, slots].to(wide), reader.count)
    deposits.value_sum[:s, :n].addcdiv_(grad_values[:, slots].to(wide), reader.count)
    # The queries of the product are scale * q.
    queries = step.part(call.q, block)
    by_head = grad_queries.view(queries.shape)
    grads.scale[step.query_heads] += (by_head * queries.to(wide)).sum((0, 2, 3))
    grad_queries = by_head * call.scale[step.query_heads, None, None]
    step.put(grads.q, grad_queries.view(s, -1, call.q.shape[-1]), block)


def _backward_norms(
    step: Step,
    block: slice,
    reader: Reader,
    call: _Saved,
    grads: _Inputs,
    grad_scores: Tensor,
    grad_keys: Tensor,
) -> None:
    """Gradient of the -scale |D|^2 / 2 in the scores, added to those of the scale and of the keys."""
    scales, wide = step.scales(call.scale), grads.scale.dtype
    by_slot = grad_scores.view(*scales.shape, -1, grad_scores.shape[-1]).sum(2, dtype=wide)
    grad_scales = (by_slot * reader.half_norms(step, block)[:, None]).sum(-1)
    grads.scale[step.query_heads] -= (
        grad_scales.view(-1, len(step.group.heads), scales.shape[1]).sum(0).view(-1)
    )
    weights = (by_slot * scales[..., None]).sum(1)[..., None]
    grad_keys -= (weights * reader.keys(step, block)).to(grad_keys.dtype)
