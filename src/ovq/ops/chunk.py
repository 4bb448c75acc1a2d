"""The `torch` backend: chunk by chunk in large matrix products, with a backward in O(T) memory.

For each chunk of a group of streams the forward (1) reads: one softmax over [chunk | dictionary], (2) routes
the chunk's keys, (3) adds them to the sums of their slots.

The backward keeps nothing per chunk but the slot of each token. It walks the chunks in reverse and *rewinds*
the
dictionary: with assignments fixed the sums are linear in the keys and values, so subtracting a chunk gives
the dictionary that its queries read, and the gradient of the sums just accumulates (`docs/math.md`).
Probabilities are computed again, which costs less than reading back anything that would save it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ovq.ops.groups import Group, Plan, Step
from ovq.ops.routing import Router, padded_slots
from ovq.ops.sums import Sums


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


class _ChunkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, key_sum, value_sum, count, plan):
        sums = Sums(key_sum.clone(), value_sum.clone(), count.clone())
        o = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        # The slot of every token of a complete chunk; int32 holds any dictionary.
        slots = torch.zeros(*k.shape[:3], 1, dtype=torch.int32, device=k.device)
        for group in plan.groups(q.device):
            _forward_group(group, q, k, v, scale, sums, o, slots)
        ctx.save_for_backward(q, k, v, scale, o, sums.key, sums.value, sums.count, slots)
        ctx.plan = plan
        ctx.mark_non_differentiable(sums.count)
        ctx.set_materialize_grads(False)
        return o, sums.key, sums.value, sums.count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_o, grad_key_sum, grad_value_sum, _):
        q, k, v, scale, o, key_sum, value_sum, count, slots = ctx.saved_tensors
        call = _Call(q, k, v, scale, o, torch.zeros_like(o) if grad_o is None else grad_o, slots)
        grads = _Call(torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.zeros_like(scale))
        final = Sums(key_sum, value_sum, count)
        # A: the gradient of the sums, which starts as that of the final state and ends as that of the
        # initial.
        deposits = Sums(
            torch.zeros_like(key_sum) if grad_key_sum is None else grad_key_sum.clone(),
            torch.zeros_like(value_sum) if grad_value_sum is None else grad_value_sum.clone(),
        )
        # Autocast would run these products in a lower precision than the forward did.
        with torch.autocast(q.device.type, enabled=False):
            for group in ctx.plan.groups(q.device):
                _backward_group(group, call, final, deposits, grads)
        return grads.q, grads.k, grads.v, grads.scale, deposits.key, deposits.value, None, None


@dataclasses.dataclass
class _Call:
    """The tensors of a call, or their gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor
    o: Tensor | None = None
    grad_o: Tensor | None = None
    slots: Tensor | None = None


class _Reader:
    """The softmax of a group's queries over [chunk | dictionary], with the scratch memory it needs.

    After `attend`, for S streams, G * w queries and w + n candidates: `queries` `[S, G w, K]` (scaled),
    `keys` `[S, w + n, K]`, `values` `[S, w + n, V]`, `chunk_keys` and `chunk_values` `[S, w, D]` in the
    dtype of the sums, `means` `[S, padded M, K]` likewise, and `count` `[S, n, 1]`, at least 1.
    """

    def __init__(self, group: Group, q: Tensor, v: Tensor, wide: torch.dtype) -> None:
        width, capacity = group.plan.aligned.width, group.plan.capacity
        rows = width + padded_slots(capacity)
        # [chunk | dictionary | spare]: what a step attends to is one contiguous block, whatever its sizes.
        self._keys = q.new_zeros(group.num_streams, rows, q.shape[-1])
        self._values = q.new_zeros(group.num_streams, rows, v.shape[-1])
        self._wide = wide
        self._width = width
        self._all_means = (
            self._keys[:, width:] if q.dtype == wide else torch.zeros_like(self._keys[:, width:], dtype=wide)
        )
        size = group.num_streams * group.plan.group_size * width * (width + capacity)
        self._scores = q.new_empty(size)
        self._probs = q.new_empty(size)
        future = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
        self._causal = q.new_zeros(width, width).masked_fill_(future, -torch.inf)

    def attend(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, sums: Sums) -> Tensor:
        """Probabilities `[S, G w, w + n]` of the step, scratch that the next call overwrites."""
        self._load(step, k, v, sums)
        group, w = step.group, step.num_tokens
        size = group.plan.group_size
        scale = scale[group.heads.start * size : group.heads.stop * size]
        queries = step.take(q).view(-1, len(group.heads) * size, w, q.shape[-1])
        self.queries = (queries.to(self._wide) * scale[:, None, None]).to(q.dtype)
        self.queries = self.queries.view(step.num_streams, size * w, q.shape[-1])
        scores, probs = self.scratch(step)
        by_token = scores.view(step.num_streams, size, w, -1)
        by_token[..., :w] = self._causal[:w, :w]
        # log 0 = -inf takes spare slots out.
        counts = sums.count[: step.num_streams, : step.num_slots].to(self._wide)
        by_token[..., w:] = counts.log()[:, None, None]
        scores.baddbmm_(self.queries, self.keys.transpose(1, 2))
        return torch.softmax(scores, -1, out=probs)

    def scratch(self, step: Step) -> tuple[Tensor, Tensor]:
        """Two buffers `[S, G w, w + n]`: one is free once `attend` has returned the other."""
        rows = step.group.plan.group_size * step.num_tokens
        shape = (step.num_streams, rows, step.num_tokens + step.num_slots)
        size = shape[0] * shape[1] * shape[2]
        return self._scores[:size].view(shape), self._probs[:size].view(shape)

    def _load(self, step: Step, k: Tensor, v: Tensor, sums: Sums) -> None:
        """Put the step's tokens and the current means side by side."""
        s, n, width = step.num_streams, step.num_slots, self._width
        first = width - step.num_tokens
        chunk_keys, chunk_values = step.take(k), step.take(v)
        self._keys[:s, first:width] = chunk_keys
        self._values[:s, first:width] = chunk_values
        self.chunk_keys, self.chunk_values = chunk_keys.to(self._wide), chunk_values.to(self._wide)
        self.means = self._all_means[:s]
        self.count = sums.count[:s, :n].clamp(min=1).to(self._wide).unsqueeze(-1)
        torch.div(sums.key[:s, :n], self.count, out=self.means[:, :n])
        if self._keys.dtype == self._wide:
            torch.div(sums.value[:s, :n], self.count, out=self._values[:s, width : width + n])
        else:
            self._keys[:s, width : width + n] = self.means[:, :n]
            self._values[:s, width : width + n] = sums.value[:s, :n] / self.count
        self.keys = self._keys[:s, first : width + n]
        self.values = self._values[:s, first : width + n]


def _forward_group(
    group: Group, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, sums: Sums, o: Tensor, slots: Tensor
) -> None:
    """All chunks of a group, in order; fills `o` and `slots` and updates `sums` in place."""
    sums = sums.of(group)
    reader = _Reader(group, q, v, sums.key.dtype)
    router = Router(
        num_streams=group.num_streams,
        max_slots=group.plan.capacity,
        rules=group.plan.rules,
        like=sums.key,
    )
    for step in group.steps():
        probs = reader.attend(step, q, k, v, scale, sums)
        step.put(o, torch.bmm(probs, reader.values))
        s = step.num_complete
        if s:
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


def _backward_group(group: Group, call: _Call, final: Sums, deposits: Sums, grads: _Call) -> None:
    """All chunks of a group, in reverse; fills the gradients of tokens and updates `deposits` in place."""
    sums, deposits = final.of(group).clone(), deposits.of(group)
    reader = _Reader(group, call.q, call.v, sums.key.dtype)
    for step in reversed(group.steps()):
        s = step.num_complete
        grad_k = grad_v = None
        if s:
            # 1. The tokens of the chunk get the gradient of the sums they were added to.
            chosen = step.take(call.slots)[:s].squeeze(-1).long()
            index = sums.index(chosen)
            grad_k = deposits.key.view(-1, deposits.key.shape[-1])[index].view(s, -1, call.k.shape[-1])
            grad_v = deposits.value.view(-1, deposits.value.shape[-1])[index].view(s, -1, call.v.shape[-1])
            # 2. Rewind: the dictionary as the chunk's queries saw it. Slots that the chunk opened are gone.
            keys, values = step.take(call.k)[:s], step.take(call.v)[:s]
            sums.add_(chosen, keys.to(sums.key.dtype), values.to(sums.key.dtype), -1)
            opened = sums.count[:s] == 0
            for x in (sums.key, sums.value, deposits.key, deposits.value):
                x[:s].masked_fill_(opened[..., None], 0)
        # 3. Backward of the read from that dictionary.
        _backward_read(step, reader, call, sums, deposits, grads, grad_k, grad_v)


def _backward_read(
    step: Step,
    reader: _Reader,
    call: _Call,
    sums: Sums,
    deposits: Sums,
    grads: _Call,
    merged_k: Tensor | None,
    merged_v: Tensor | None,
) -> None:
    """Gradients of one step's softmax; `merged_k`, `merged_v`: what its tokens got from being merged."""
    wide, w, n, s = sums.key.dtype, step.num_tokens, step.num_slots, step.num_streams
    size, heads = step.group.plan.group_size, step.group.heads
    probs = reader.attend(step, call.q, call.k, call.v, call.scale, sums)
    grad_scores, _ = reader.scratch(step)
    grad_o = step.take(call.grad_o)
    grad_values = torch.bmm(probs.transpose(1, 2), grad_o).to(wide)
    # dS = P (dP - sum(P dP)), and sum(P dP) = sum(o do).
    inner = (step.take(call.o).to(wide) * grad_o.to(wide)).sum(-1, keepdim=True)
    torch.bmm(grad_o, reader.values.transpose(1, 2), out=grad_scores)
    grad_scores.sub_(inner.to(grad_scores.dtype)).mul_(probs)
    grad_keys = torch.bmm(grad_scores.transpose(1, 2), reader.queries).to(wide)
    grad_queries = torch.bmm(grad_scores, reader.keys).to(wide)
    grad_k, grad_v = grad_keys[:, :w], grad_values[:, :w]
    if merged_k is not None:
        done = len(merged_k)
        grad_k[:done] += merged_k
        grad_v[:done] += merged_v
    step.put(grads.k, grad_k)
    step.put(grads.v, grad_v)
    deposits.key[:s, :n].addcdiv_(grad_keys[:, w:], reader.count)
    deposits.value[:s, :n].addcdiv_(grad_values[:, w:], reader.count)
    # The queries of the product are scale * q.
    by_head = grad_queries.view(-1, len(heads) * size, w, call.q.shape[-1])
    part = slice(heads.start * size, heads.stop * size)
    queries = step.take(call.q).view_as(by_head)
    grads.scale[part] += (by_head * queries.to(wide)).sum((0, 2, 3))
    step.put(grads.q, (by_head * call.scale[part, None, None]).view(s, size * w, -1))
