"""What tokens that forget weigh, and by how much dictionaries fade, for all chunks of a call at once.

`fading.py` says why it is done so, and does it piece by piece; the numbers are the same to the last bit.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.backends.plan import Plan
from ovq.ops.call import Call
from ovq.ops.state import OVQState


def with_frames(call: Call, before: OVQState, plan: Plan) -> tuple[OVQState, Tensor, Tensor]:
    """Weights as of the ends of complete chunks, and as of the beginnings of others.

    Args:
        call: a call with `log_forget`, and so with weights.
        before: the state that it starts from, rows in sorted order.
        plan: the plan of the call.

    Returns:
        The state `before`, but with the `pending_forget` that is right after the call; the weights
        `[num_chunks, W, Hkv, 1]` of all tokens, pending ones among them; and `[num_chunks, Hkv]` what slots
        are multiplied by before a chunk is read: less than 1 where it is complete.
    """
    assert call.log_forget is not None
    assert call.token_weights is not None
    assert before.pending_forget is not None
    assert before.pending_weights is not None
    aligned, size, wide = plan.aligned, plan.options.chunk_size, before.pending_weights.dtype
    # Rows of no token have no chunk, and come last.
    num_rows = sum(n > 0 for n in aligned.lengths)
    device = call.log_forget.device
    first = torch.tensor(aligned.first_chunk[:num_rows], dtype=torch.int64, device=device)
    chunks = [aligned.chunks_of(r) for r in range(num_rows)]
    logs = aligned.align(call.log_forget[..., None], None)[..., 0].clone()
    # Tokens that were pending stand before the new ones, and nothing is forgotten at their places.
    logs[first, 0] += before.pending_forget[:num_rows]
    logs = logs.cumsum(1)
    total = logs[:, -1]
    is_complete = [
        n >= (i + 1) * size for n, num in zip(aligned.lengths, chunks, strict=False) for i in range(num)
    ]
    frame = total * torch.tensor(is_complete, device=device)[:, None]
    fading = frame.exp().to(wide)
    ones, zeros = torch.ones_like(call.token_weights), torch.zeros_like(before.pending_weights)
    is_new = aligned.align(ones[..., None], zeros[..., None]) > 0
    own = aligned.align(call.token_weights[..., None], before.pending_weights[..., None])
    # Those of pending tokens are as of the beginning of their chunk already.
    own = torch.where(is_new, own * (-logs).exp().to(wide)[..., None], own)
    weights = own * fading[:, None, :, None]
    left = before.pending_forget.clone()
    last = first + torch.tensor(chunks, dtype=torch.int64, device=device) - 1
    left[:num_rows] = (total - frame)[last]
    return dataclasses.replace(before, pending_forget=left), weights, fading
