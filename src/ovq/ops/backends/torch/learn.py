"""Merging a whole call into dictionaries without reading them, to learn which token goes to which slot."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.learned import Learned
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.torch.constant_rate import moved
from ovq.ops.backends.torch.merge import MergedSlots, learn_by_likelihood
from ovq.ops.backends.torch.route import Router, padded_slots
from ovq.ops.backends.torch.streams import Group, Step, groups_of
from ovq.ops.state import slot_means


def learn(k: Tensor, v: Tensor, sums: Dictionary, plan: Plan) -> Learned:
    """Merge all complete chunks, in place; see `Learn`."""
    slots = torch.zeros(*k.shape[:3], 1, dtype=torch.int32, device=k.device)
    by_chunk = None
    if plan.options.merges_pairs:
        stay = torch.arange(sums.count.shape[2], dtype=torch.int32, device=k.device)
        by_chunk = stay.repeat(k.shape[0], 1, k.shape[2], 1)
    for group in groups_of(plan, k.device):
        _learn_group(group, k, v, group.dictionary(sums), slots, by_chunk)
    return Learned(slots[..., 0], None if by_chunk is None else by_chunk[:, 0])


def _learn_group(
    group: Group, k: Tensor, v: Tensor, sums: Dictionary, slots: Tensor, by_chunk: Tensor | None
) -> None:
    """Merge the chunks of a group, in order; fills `slots` and, where pairs are merged, `by_chunk`."""
    options, capacity, wide = group.plan.options, group.plan.capacity, sums.key_sum.dtype
    router = Router(num_streams=group.num_streams, max_slots=capacity, options=options, like=sums.key_sum)
    for step in group.steps():
        s = step.num_complete
        if not s:
            continue
        keys, values = (step.take(x)[:s].to(wide) for x in (k, v))
        if by_chunk is not None:
            chosen, merged = learn_by_likelihood(sums, keys, values, step.before[:s], step.after, options)
            _put_moves(step, by_chunk, merged)
        else:
            means = slot_means(sums.key_sum[:s], sums.count[:s])
            chosen = router(
                keys,
                torch.nn.functional.pad(means, (0, 0, 0, padded_slots(capacity) - capacity)),
                step.before[:s],
                step.after,
                heads=step.heads,
                num_seen=step.num_seen,
            )
            if isinstance(options.rate, str):
                sums.add_(chosen, keys, values, 1)
            else:
                part = Dictionary(sums.key_sum[:s], sums.value_sum[:s], sums.count[:s])
                after = moved(part, chosen, router.is_opener, keys, values, options.rate)
                for name in ("key_sum", "value_sum", "count"):
                    getattr(part, name).copy_(getattr(after, name))
        step.put_complete(slots, chosen[..., None])


def _put_moves(step: Step, by_chunk: Tensor, merged: MergedSlots) -> None:
    """Write to `by_chunk` `[num_chunks, 1, Hkv, M]` where a step put what its streams' slots held."""
    capacity = by_chunk.shape[-1]
    to = torch.arange(capacity, device=by_chunk.device).repeat(step.num_streams, 1)
    to.view(-1)[merged.source] = merged.target % capacity
    step.put(by_chunk, to, slice(0, 1))
