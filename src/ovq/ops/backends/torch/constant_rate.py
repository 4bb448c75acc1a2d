"""The ablation `rate=r`: slot means that move by a constant share r towards each merged token.

Such means forget, so the backward cannot rewind them by subtraction as `chunk.py` does. This is the same loop
over chunks, differentiated by ordinary autograd, which stores the probabilities of every chunk. The state is
still sums and counts, with sum = mean * count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.torch.read import without_non_finite
from ovq.ops.backends.torch.route import Router
from ovq.ops.backends.torch.streams import CompleteChunk, Group, Step
from ovq.ops.precision import rounded
from ovq.ops.selection import padded_to_blocks
from ovq.ops.sums import slot_means


def constant_rate_attention(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, _: None, *of_sums: Any
) -> tuple[Tensor, ...]:
    """`ChunkAttention` for a constant rate, with the same arguments and results but without weights."""
    # One group of all streams: nothing is written in place here, so smaller groups would gain nothing.
    group = Group(plan, range(len(plan.slots)), range(plan.num_kv_heads))
    sums = group.dictionary(Dictionary(*of_sums).map(Tensor.contiguous))
    num, most, wide = group.num_streams, plan.capacity, sums.key_sum.dtype
    router = Router(num_streams=num, max_slots=most, options=plan.options, like=sums.key_sum)
    outputs, places = [], []
    for i, step in enumerate(group.steps()):
        keys, values = (step.take(x).to(wide) for x in (k, v))
        means, o = _read(step, q, scale, keys, values, sums)
        o = o.view(-1, q.shape[2], step.num_tokens, v.shape[-1]).transpose(1, 2)
        missing = q.shape[1] - step.num_tokens
        outputs.append(torch.nn.functional.pad(o, (0, 0, 0, 0, 0, missing)))
        places += [plan.aligned.first_chunk[r] + i for r in range(len(o))]
        if step.num_complete:
            sums = _learned(step, sums, means.detach(), keys, values, router)
    order = torch.tensor(places, device=q.device).argsort()
    o = torch.cat(outputs).index_select(0, order).to(q.dtype)
    return o, *(x.view(before.shape) for x, before in zip(sums.tensors[:3], of_sums[:3], strict=True))


def _read(
    step: Step, q: Tensor, scale: Tensor, keys: Tensor, values: Tensor, sums: Dictionary
) -> tuple[Tensor, Tensor]:
    """Means `[S, n, K]` and outputs `[S, G, w, V]` of a step: one softmax over [dictionary | chunk]."""
    s, n, w = step.num_streams, step.num_slots, step.num_tokens
    count = sums.count[:s, :n]
    means, mean_values = (slot_means(x[:s, :n], count) for x in (sums.key_sum, sums.value_sum))
    candidates = torch.cat([means, keys], 1)
    # log 0 = -inf excludes spare slots; a token of the chunk is a slot of count 1.
    bias = torch.cat([count.to(keys.dtype).log(), keys.new_zeros(s, w)], 1)[:, None, None]
    scales = step.scales(scale)[..., None, None]
    queries = step.take(q).to(keys.dtype).view(*scales.shape[:2], w, -1)
    scores = scales * (queries @ candidates.transpose(1, 2)[:, None]) + bias
    if step.group.plan.options.ablation.bias == "count+norm":
        scores = scores - scales * candidates.square().sum(-1)[:, None, None] / 2
    future = torch.ones(w, w, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(torch.nn.functional.pad(future, (n, 0)), -torch.inf)
    values, non_finite = without_non_finite(values)
    o = scores.softmax(-1) @ torch.cat([mean_values, values], 1)[:, None]
    return means, o if non_finite is None else o + non_finite[:, None]


def _learned(
    step: Step, sums: Dictionary, means: Tensor, keys: Tensor, values: Tensor, router: Router
) -> Dictionary:
    """Dictionaries of all streams after merging the step's complete chunks."""
    s, n, rate = step.num_complete, step.num_slots, router.options.ablation.rate
    assert not isinstance(rate, str)
    padded = means.new_zeros(s, padded_to_blocks(max(n, 1)), means.shape[-1])
    padded[:, :n] = means[:s]
    chunk = CompleteChunk(step, keys[:s], values[:s])
    with torch.no_grad():
        slots = router(chunk, padded)
    part = moved(sums, slots, router.is_opener, chunk.keys, chunk.values, rate)
    pairs = zip(part.tensors[:3], sums.tensors[:3], strict=True)
    return Dictionary(*(torch.cat([new, x[s:]]) for new, x in pairs))


def moved(
    sums: Dictionary, slots: Tensor, is_opener: Tensor, keys: Tensor, values: Tensor, rate: float
) -> Dictionary:
    """The first S dictionaries after each token x has moved the mean of its slot, D <- D + rate (x - D).

    The m tokens of a slot, in order of position, give D (1 - rate)^m + sum_j rate (1 - rate)^(m - j) x_j.
    This is evaluated in one step, in float64. A token that opened its slot comes first and sets the mean.

    Args:
        sums: dictionaries `[S, M, ...]` of these streams, or more; not changed.
        slots: `[S, C]` slot of each token.
        is_opener: `[S, C]` mask of the tokens that opened their slot.
        keys: `[S, C, K]`. values: `[S, C, V]`.
        rate: in (0, 1].
    """
    sums = sums.map(lambda x: x[: len(slots)])
    index = sums.index(slots)
    is_step = ~is_opener
    # Number of later steps of each token's slot.
    is_later = torch.ones(slots.shape[1], slots.shape[1], dtype=torch.bool, device=slots.device).triu(1)
    is_later = (is_later | is_opener[..., None]) & is_step[:, None] & (slots[..., None] == slots[:, None])
    weight = torch.pow(1.0 - rate, is_later.sum(-1).double())
    weight = torch.where(is_step, rate * weight, weight)
    before = sums.count.flatten()
    after = before.index_add(0, index, torch.ones_like(index))
    num_steps = torch.zeros_like(before).index_add(0, index, is_step.flatten().to(before.dtype))
    # Factors of sums, not of means, so that slots without new tokens stay bitwise unchanged.
    kept = torch.pow(1.0 - rate, num_steps.double()) * after / before.clamp(min=1)

    def stepped(old: Tensor, x: Tensor) -> Tensor:
        flat = old.reshape(-1, old.shape[-1]).double()
        weighted = (weight[..., None] * x.double()).reshape(-1, x.shape[-1])
        new = torch.zeros_like(flat).index_add(0, index, weighted)
        return rounded(flat * kept[:, None] + new * after[:, None], old.dtype).reshape(old.shape)

    return Dictionary(
        stepped(sums.key_sum, keys), stepped(sums.value_sum, values), after.view(sums.count.shape)
    )
