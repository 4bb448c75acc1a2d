"""Merging complete chunks without reading: decoded tokens, a converted model's, or to say where tokens go."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.backends.learned import Learned, Merging
from ovq.ops.backends.triton.launch import recurrence_of
from ovq.ops.backends.triton.merging import Gone
from ovq.ops.backends.triton.weights import Weights
from ovq.ops.backends.triton.work import Work


def merge(chunks: Merging, work: Work | None = None, gone: Gone | None = None) -> Tensor:
    """Merge complete chunks, in place.

    Args:
        chunks: see there.
        work: that of their plan, if it is known.
        gone: receives the slots that chunks merged into others, if wanted.

    Returns:
        The slot of each token, `[num_chunks, W, Hkv]`.
    """
    k, v, sums, weights = chunks.k.contiguous(), chunks.v.contiguous(), chunks.sums, chunks.token_weights
    work = _work(chunks) if work is None else work
    of_tokens = None if weights is None else Weights(weights.squeeze(-1).contiguous())
    slots = torch.zeros(k.shape[0], k.shape[2], k.shape[1], dtype=torch.int32, device=k.device)
    recurrence = recurrence_of(k, v, slots, sums, work, gone, of_tokens)
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(k):
        for i in range(work.num_steps + 1):
            recurrence.step(i)
    return slots.transpose(1, 2)


def learn(chunks: Merging) -> Learned:
    """Merge complete chunks, and say where their tokens went."""
    if not chunks.plan.options.merges_pairs:
        return Learned(merge(chunks), None)
    work, has_weights = _work(chunks), chunks.token_weights is not None
    gone = Gone.empty(work, chunks.k, chunks.v, is_kept=True, has_weights=has_weights)
    # Chunks that are not complete note nothing.
    gone.slot.fill_(-1)
    slots = merge(chunks, work, gone)
    # From the order of the recurrence to that of the layout.
    order = work.table[:, 0].argsort()
    return Learned.of_moves(slots, gone.slot[order], gone.into[order], chunks.sums.count.shape[2])


def _work(chunks: Merging) -> Work:
    return Work(chunks.plan, chunks.sums.count.shape[2], chunks.k.device)
