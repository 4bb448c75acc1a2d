"""Merging complete chunks without reading: decoded tokens, a converted model's, or to say where tokens go."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.learned import Learned
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.triton.launch import recurrence_of
from ovq.ops.backends.triton.merging import Gone
from ovq.ops.backends.triton.weights import Weights
from ovq.ops.backends.triton.work import Work


def merge(
    k: Tensor,
    v: Tensor,
    sums: Dictionary,
    plan: Plan,
    token_weights: Tensor | None = None,
    *,
    work: Work | None = None,
    gone: Gone | None = None,
) -> Tensor:
    """Merge complete chunks into dictionaries, in place; arguments as for `learn` of `backends`.

    Args:
        work: that of the plan, if it is known.
        gone: receives the slots that chunks merged into others, if wanted.

    Returns:
        The slot of each token, `[num_chunks, W, Hkv]`.
    """
    k, v = k.contiguous(), v.contiguous()
    work = Work(plan, sums.count.shape[2], k.device) if work is None else work
    weights = None if token_weights is None else Weights(token_weights.squeeze(-1).contiguous())
    slots = torch.zeros(k.shape[0], k.shape[2], k.shape[1], dtype=torch.int32, device=k.device)
    recurrence = recurrence_of(k, v, slots, sums, work, gone, weights)
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(k):
        for i in range(work.num_steps + 1):
            recurrence.step(i)
    return slots.transpose(1, 2)


def learn(k: Tensor, v: Tensor, sums: Dictionary, plan: Plan, token_weights: Tensor | None = None) -> Learned:
    """Merge complete chunks, and say where their tokens went; see `learn` of `backends`."""
    if not plan.options.merges_pairs:
        return Learned(merge(k, v, sums, plan, token_weights), None)
    work = Work(plan, sums.count.shape[2], k.device)
    gone = Gone.empty(work, k, v, is_kept=True, has_weights=token_weights is not None)
    # Chunks that are not complete note nothing.
    gone.slot.fill_(-1)
    slots = merge(k, v, sums, plan, token_weights, work=work, gone=gone)
    # From the order of the recurrence to that of the layout.
    order = work.table[:, 0].argsort()
    return Learned.of_moves(slots, gone.slot[order], gone.into[order], sums.count.shape[2])
