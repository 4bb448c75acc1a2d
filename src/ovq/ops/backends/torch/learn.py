"""Merging chunks into dictionaries without computing attention, and reporting the slots of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.learned import Learned, Merging
from ovq.ops.backends.torch.constant_rate import moved
from ovq.ops.backends.torch.merge import ChangedSlots, merge_chunk
from ovq.ops.backends.torch.route import Router
from ovq.ops.backends.torch.streams import Group, Step, groups_of
from ovq.ops.fading import bounding_factor
from ovq.ops.narrow import rounded_
from ovq.ops.selection import padded_to_blocks
from ovq.ops.sums import slot_means


def learn(chunks: Merging) -> Learned:
    """Merge complete chunks and return the slots of their tokens."""
    k, plan, sums = chunks.k, chunks.plan, chunks.sums
    slots = torch.zeros(*k.shape[:3], 1, dtype=torch.int32, device=k.device)
    by_chunk = None
    if plan.options.merges_pairs:
        stay = torch.arange(sums.count.shape[2], dtype=torch.int32, device=k.device)
        by_chunk = stay.repeat(k.shape[0], 1, k.shape[2], 1)
    for group in groups_of(plan, k.device):
        _learn_group(group, chunks, slots, by_chunk)
    return Learned(slots[..., 0], None if by_chunk is None else by_chunk[:, 0])


def _learn_group(group: Group, chunks: Merging, slots: Tensor, by_chunk: Tensor | None) -> None:
    """Merge the chunks of a group in order; fills `slots` and, for rules that merge pairs, `by_chunk`."""
    sums, fading = group.dictionary(chunks.sums), chunks.fading
    options, capacity = group.plan.options, group.plan.capacity
    router = Router(num_streams=group.num_streams, max_slots=capacity, options=options, like=sums.key_sum)
    for step in group.steps():
        s = step.num_complete
        if not s:
            continue
        chunk = step.complete_chunk(chunks.k, chunks.v, chunks.token_weights, sums.key_sum.dtype)
        if fading is not None:
            _multiply(sums, step.take(fading[:, None, :, None])[:s, :, 0], options.state_dtype)
        missing = padded_to_blocks(capacity) - capacity
        means = torch.nn.functional.pad(slot_means(sums.key_sum[:s], sums.mass[:s]), (0, 0, 0, missing))
        if isinstance(options.ablation.rate, str):
            chosen, changed = merge_chunk(sums, chunk, options, router, means)
            if by_chunk is not None:
                assert changed is not None
                _put_moves(step, by_chunk, changed)
        else:
            chosen = router(chunk, means)
            after = moved(sums, chosen, router.is_opener, chunk.keys, chunk.values, options.ablation.rate)
            for x, new in zip(sums.tensors[:3], after.tensors[:3], strict=True):
                x[:s] = new
        if fading is not None:
            assert sums.weight is not None
            bound = bounding_factor(sums.weight[:s], frees_slots=options.merges_pairs)
            if bound is not None:
                _multiply(sums, bound, options.state_dtype)
        step.put_complete(slots, chosen[..., None])


def _multiply(sums: Dictionary, factor: Tensor, state_dtype: str) -> None:
    """Multiply weights and sums of the first S streams by factors `[S, 1]` or `[S, M]`, in place."""
    assert sums.weight is not None
    weight = sums.weight[: len(factor)]
    faded = weight * factor
    for x in (sums.key_sum, sums.value_sum):
        if state_dtype == "float32":
            x[: len(factor)] *= factor[..., None]
        else:
            rounded_(x[: len(factor)], state_dtype, weight, faded)
    weight.copy_(faded)


def _put_moves(step: Step, by_chunk: Tensor, changed: ChangedSlots) -> None:
    """Write to `by_chunk` `[num_chunks, 1, Hkv, M]` the slot that each slot was merged into, or itself."""
    capacity = by_chunk.shape[-1]
    to = torch.arange(capacity, device=by_chunk.device).repeat(step.num_streams, 1)
    to.view(-1)[changed.source] = changed.target % capacity
    step.put(by_chunk, to, slice(0, 1))
