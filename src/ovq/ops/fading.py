"""Forgetting (`log_forget` of `ovq_attention`) expressed as weights of tokens and slots, chunk by chunk.

A softmax is invariant to a common factor of all weights. So a token with forget factor f leaves the
dictionary unchanged: it and the later tokens of the chunk are weighted by 1 / f instead, and everything is
rescaled once when the chunk is complete (`docs/method/math.md`, section 10). Backends see only weights.

Weights are bitwise equal however a chunk is split into calls, so that repeated keys go to the same slots:
logs are added up in float64, token by token, and the rescaling at the end is a multiplication of its own.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.options import Options
from ovq.ops.state import OVQState
from ovq.ops.sums import divisor

#: `log_forget` is clamped at this divided by C, so that the weights of a chunk stay within float32.
LEAST_LOG = -48.0
#: Minimum weight of a slot at the end of a chunk. Rules that merge pairs set a lower weight to 0, so that the
#: next merge frees the slot. The other rules never free a slot; its weight stays at this minimum.
LEAST_WEIGHT = 1e-12


def begun(
    state: OVQState, weights: Tensor, log_forget: Tensor, is_complete: Tensor
) -> tuple[OVQState, Tensor, Tensor]:
    """State and token weights that express the forgetting of some tokens to the op.

    Args:
        state: the state before these tokens.
        weights: `[R, W, Hkv]` weights of tokens of one chunk of each row.
        log_forget: `[R, W, Hkv]` their log forget gates, float64, 0 for padding.
        is_complete: `[R]` whether these tokens complete the chunk.

    Returns:
        The initial state for the op; the token weights for the op; `pending_forget` after these tokens.
    """
    assert state.pending_forget is not None
    logs = torch.cat([state.pending_forget[:, None], log_forget], 1).cumsum(1)[:, 1:]
    weights = weights * (-logs).exp().to(weights.dtype)
    total = logs[:, -1]
    # Weights are relative to the end of a complete chunk, and to the start of an incomplete one.
    log_fading = total * is_complete.to(total.device, total.dtype)[:, None]
    if bool(is_complete.any()):
        state = faded(state, log_fading)
        weights = weights * log_fading.exp().to(weights.dtype)[:, None]
    return state, weights, total - log_fading


def ended(state: OVQState, pending_forget: Tensor, is_complete: Tensor, options: Options) -> OVQState:
    """The state after tokens that forget, from the state that the op returned; see `begun`."""
    if bool(is_complete.any()):
        assert state.weight is not None
        factor = bounding_factor(state.weight.detach(), frees_slots=options.merges_pairs)
        if factor is not None:
            state = _with_slots_times(
                state, factor.masked_fill(~is_complete.to(factor.device)[:, None, None], 1)
            )
    after = dataclasses.replace(state, pending_forget=pending_forget)
    # The tensors are the same, so the prepared decode step stays valid.
    after._step = state._step
    return after


def faded(state: OVQState, log_factor: Tensor) -> OVQState:
    """`state` with all weights and sums multiplied by exp(`log_factor`), `[B, Hkv]` in float64."""
    assert state.weight is not None
    assert state.pending_weights is not None
    factor = log_factor.exp().to(state.weight.dtype)[..., None]
    faded = _with_slots_times(state, factor)
    # A copy: autograd keeps what is multiplied, and other decode steps from the state may write to it.
    return dataclasses.replace(faded, pending_weights=state.pending_weights.clone() * factor)


def bounding_factor(weight: Tensor, *, frees_slots: bool) -> Tensor | None:
    """Factor of slot weights that sets those below `LEAST_WEIGHT` to 0 (`frees_slots`) or to that minimum.

    None stands for a factor of 1 everywhere. There is no gradient through the factor.
    """
    is_low = (weight > 0) & (weight < LEAST_WEIGHT)
    if not bool(is_low.any()):
        return None
    factor = torch.zeros_like(weight) if frees_slots else LEAST_WEIGHT / divisor(weight, weight.dtype)
    return torch.where(is_low, factor, torch.ones_like(weight))


def _with_slots_times(state: OVQState, factor: Tensor) -> OVQState:
    assert state.weight is not None
    after = dataclasses.replace(state, weight=state.weight * factor)
    if state.state_dtype != "float32":
        # Means do not fade. In the wide dtype and back, as those of slots that lose all weight become 0.
        return after.to_state_dtype("float32").to_state_dtype(state.state_dtype)
    of_sums = factor[..., None]
    return dataclasses.replace(after, key_sum=state.key_sum * of_sums, value_sum=state.value_sum * of_sums)
