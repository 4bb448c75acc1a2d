"""What forgetting does to a state: `log_forget` of `ovq_attention`, piece by piece.

A softmax stays what it is if all weights are multiplied by one number. So a token of factor f need not touch
the dictionary: it and the tokens after it count 1 / f times as much instead, and when the chunk is complete,
everything is scaled once (`docs/method/math.md`, section 10). Backends see weights of tokens
and of slots, no more.

Weights are the same to the last bit however a chunk is split into calls, so that keys which repeat go to the
same slots: logs are added up in float64, one after the other, and what was 1 / f is scaled at the end in a
second step.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.options import Options
from ovq.ops.state import OVQState
from ovq.ops.sums import divisor

#: No token's log is lower than this over C, so that the weights of a chunk stay within float32.
LEAST_LOG = -48.0
#: A slot that weighs less once a chunk is complete is dropped where pairs are merged: its weight is 0 then,
#: and the next merge frees it. By the other rules, which never free a slot, it fades no further.
LEAST_WEIGHT = 1e-12


def begun(
    state: OVQState, weights: Tensor, log_forget: Tensor, is_complete: Tensor
) -> tuple[OVQState, Tensor, Tensor]:
    """What the op is to read and merge in the place of tokens that forget.

    Args:
        state: the state before them.
        weights: `[R, W, Hkv]` of tokens of one chunk of each row.
        log_forget: `[R, W, Hkv]` of the same, float64, 0 for padding.
        is_complete: `[R]` whether they complete the chunk.

    Returns:
        The state that they see; their weights; `pending_forget` afterwards.
    """
    assert state.pending_forget is not None
    logs = torch.cat([state.pending_forget[:, None], log_forget], 1).cumsum(1)[:, 1:]
    weights = weights * (-logs).exp().to(weights.dtype)
    total = logs[:, -1]
    # Relative to the end of a chunk that is completed, to the beginning of any other.
    frame = total * is_complete.to(total.device, total.dtype)[:, None]
    if bool(is_complete.any()):
        state = faded(state, frame)
        weights = weights * frame.exp().to(weights.dtype)[:, None]
    return state, weights, total - frame


def ended(state: OVQState, pending_forget: Tensor, is_complete: Tensor, options: Options) -> OVQState:
    """The state after tokens that forget, from that of the op; the other arguments are as in `begun`."""
    if bool(is_complete.any()):
        state = bounded(state, is_complete, frees_slots=options.merges_pairs)
    after = dataclasses.replace(state, pending_forget=pending_forget)
    # Of the same tensors, and so the same step leads on.
    after._step = state._step
    return after


def faded(state: OVQState, log_factor: Tensor) -> OVQState:
    """`state` with all weights multiplied by factors, of logs `[B, Hkv]` in float64.

    Example:
        >>> k = torch.ones(1, 4, 1, 2)
        >>> from ovq.ops import ovq_attention
        >>> _, state = ovq_attention(k, k, k, num_slots=1, chunk_size=4, output_final_state=True)
        >>> from ovq.ops.state import forgetting
        >>> state = faded(forgetting(state), torch.tensor([[0.5]], dtype=torch.float64).log())
        >>> state.weight, state.keys
        (tensor([[[2.]]]), tensor([[[[1., 1.]]]]))
    """
    assert state.weight is not None
    assert state.pending_weights is not None
    factor = log_factor.exp().to(state.weight.dtype)[..., None]
    faded = _with_slots_times(state, factor)
    return dataclasses.replace(faded, pending_weights=state.pending_weights * factor)


def bounded(state: OVQState, rows: Tensor, *, frees_slots: bool) -> OVQState:
    """`state` where no slot of some rows, a mask `[B]`, weighs less than `LEAST_WEIGHT`, unless nothing."""
    assert state.weight is not None
    factor = bounding_factor(state.weight.detach(), frees_slots=frees_slots)
    if factor is None:
        return state
    return _with_slots_times(state, factor.masked_fill(~rows.to(factor.device)[:, None, None], 1))


def bounding_factor(weight: Tensor, *, frees_slots: bool) -> Tensor | None:
    """What the weights of slots are multiplied by so that none is less than `LEAST_WEIGHT`, but 0 perhaps.

    None stands for ones. The factor has no gradient.
    """
    is_low = (weight > 0) & (weight < LEAST_WEIGHT)
    if not bool(is_low.any()):
        return None
    factor = torch.zeros_like(weight) if frees_slots else LEAST_WEIGHT / divisor(weight, weight.dtype)
    return torch.where(is_low, factor, torch.ones_like(weight))


def _with_slots_times(state: OVQState, factor: Tensor) -> OVQState:
    assert state.weight is not None
    return dataclasses.replace(
        state,
        key_sum=state.key_sum * factor[..., None],
        value_sum=state.value_sum * factor[..., None],
        weight=state.weight * factor,
    )
