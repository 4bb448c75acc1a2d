"""Forgetting: what was read earlier counts less with each token (`log_forget` of `ovq_attention`).

A softmax stays what it is if all weights are multiplied by one number. So a token of factor f need not touch
the dictionary: it and the tokens after it count 1 / f times as much instead, and when the chunk is complete,
everything is scaled once (`docs/math.md`). The backends see weights of tokens and of slots, and no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.call import RowBounds, Rows
from ovq.ops.options import Options
from ovq.ops.state import OVQState, divisor, forgetting, state_dtype

#: No token's log is lower than this over C, so that the weights of a chunk stay within float32.
LEAST_LOG = -48.0
#: A slot whose weight is less once a chunk is complete is dropped where pairs are merged: it has the weight 0
#: from then on, and the next merge frees it. By the other rules, which never free a slot, it fades no further.
LEAST_WEIGHT = 1e-12

# q, k, v, the state, the bounds of rows (None where they fill the input), weights of tokens -> outputs, and
# the state after them.
Attend = Callable[
    [Tensor, Tensor, Tensor, OVQState, RowBounds | None, Tensor], tuple[Tensor, OVQState | None]
]


def checked_log_forget(log_forget: Tensor, k: Tensor, rows: Rows, options: Options) -> Tensor:
    """`log_forget` `[B, T, Hkv]` in the dtype of the sums, no lower than a chunk allows; 0 for padding."""
    shape = tuple(k.shape[:3])
    if not isinstance(log_forget, Tensor) or tuple(log_forget.shape) != shape:
        found = tuple(log_forget.shape) if isinstance(log_forget, Tensor) else type(log_forget).__name__
        raise ValueError(f"log_forget: expected a tensor {list(shape)} as k has, found {found}")
    if not log_forget.is_floating_point():
        raise ValueError(f"log_forget: expected a floating dtype, found {log_forget.dtype}")
    if options.rate != "count":
        raise ValueError("log_forget: expected none with a constant rate, found some")
    log_forget = log_forget.to(k.device, state_dtype(k.dtype))
    flat = log_forget.detach().reshape(-1, shape[2])
    is_wrong = ~(flat <= 0)
    if bool(is_wrong.any()):
        for start, length in zip(rows.starts, rows.lengths, strict=True):
            row = slice(start, start + length)
            for wrong in flat[row][is_wrong[row]].tolist():
                raise ValueError(f"log_forget: expected numbers of at most 0, found {wrong}")
        log_forget = log_forget.masked_fill(is_wrong.view(shape), 0)
    return log_forget.clamp(min=LEAST_LOG / options.chunk_size)


def faded(state: OVQState, log_factor: Tensor) -> OVQState:
    """`state` with all weights multiplied by factors, of logs `[B, Hkv]`.

    Example:
        >>> k = torch.ones(1, 4, 1, 2)
        >>> from ovq.ops import ovq_attention
        >>> _, state = ovq_attention(k, k, k, num_slots=1, chunk_size=4, output_final_state=True)
        >>> state = faded(forgetting(state), torch.tensor([[0.5]]).log())
        >>> state.weight, state.keys
        (tensor([[[2.]]]), tensor([[[[1., 1.]]]]))
    """
    assert state.weight is not None
    assert state.pending_weights is not None
    factor = log_factor.exp()[..., None]
    faded = _with_slots_times(state, factor)
    return dataclasses.replace(faded, pending_weights=state.pending_weights * factor)


def bounded(state: OVQState, *, frees_slots: bool) -> OVQState:
    """`state` without slots of less than `LEAST_WEIGHT`: they get none, or that."""
    assert state.weight is not None
    weight = state.weight.detach()
    # Neither of the two has a gradient.
    factor = torch.zeros_like(weight) if frees_slots else LEAST_WEIGHT / divisor(weight, weight.dtype)
    return _with_slots_times(state, torch.where(weight < LEAST_WEIGHT, factor, torch.ones_like(weight)))


def _with_slots_times(state: OVQState, factor: Tensor) -> OVQState:
    assert state.weight is not None
    return dataclasses.replace(
        state,
        key_sum=state.key_sum * factor[..., None],
        value_sum=state.value_sum * factor[..., None],
        weight=state.weight * factor,
    )


def forgetful_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: OVQState,
    rows: Rows,
    options: Options,
    token_weights: Tensor | None,
    log_forget: Tensor,
    attend: Attend,
) -> tuple[Tensor, OVQState]:
    """Outputs `[B, T, H, V]` of a call, and the state after it, chunk by chunk.

    Args:
        q: `[B, T, H, K]`. k: `[B, T, Hkv, K]`. v: `[B, T, Hkv, V]`.
        state: the state before.
        rows: where the tokens of each row lie.
        options: the layer's settings.
        token_weights: `[B, T, Hkv]` what each token counts for as it is read; None for 1.
        log_forget: `[B, T, Hkv]`, checked.
        attend: the op of a piece of a chunk, which reads the tokens of the chunk by their weights.
    """
    state = forgetting(state)
    if not sum(rows.lengths):
        return q.new_zeros(*q.shape[:3], v.shape[3]), state
    if token_weights is None:
        token_weights = torch.ones_like(log_forget)
    if q.shape[1] == 1 and rows == Rows(tuple(range(len(q))), (1,) * len(q)):
        return _piece(q, k, v, state, None, token_weights, log_forget, attend, options)
    aligned = AlignedRows(
        rows,
        pending=state.num_pending.tolist(),
        chunk_size=options.chunk_size,
        num_tokens=q.shape[0] * q.shape[1],
    )
    if not aligned.is_sorted:
        state = state.select(aligned.order)
    chunks = [aligned.align(x, None) for x in (q, k, v, token_weights[..., None], log_forget[..., None])]
    outputs: list[Tensor] = []
    finished: list[OVQState] = []
    places: list[int] = []
    for i in range(aligned.chunks_of(0)):
        num = aligned.num_active(i)
        if num < state.batch_size:
            finished.append(state.select(range(num, state.batch_size)))
            state = state.select(range(num))
        own = [aligned.first_chunk[r] + i for r in range(num)]
        index = torch.tensor(own, device=q.device)
        own_q, own_k, own_v, weights, logs = (x.index_select(0, index) for x in chunks)
        bounds = _bounds(aligned, i, num)
        tokens = own_q, own_k, own_v, state, bounds, weights[..., 0], logs[..., 0]
        o, state = _piece(*tokens, attend, options)
        outputs.append(o)
        places += own
    finished.append(state)
    state = OVQState.concatenate(finished[::-1])
    order = torch.tensor(sorted(range(len(places)), key=places.__getitem__), device=q.device)
    o = aligned.unalign(torch.cat(outputs).index_select(0, order), q.shape[0], q.shape[1])
    return o, state if aligned.is_sorted else state.select(aligned.inverse())


def _bounds(aligned: AlignedRows, i: int, num: int) -> RowBounds | None:
    """Where the new tokens of the first `num` rows lie in their i-th chunks; None where they fill these."""
    width = aligned.width
    first = aligned.pending[:num] if i == 0 else [0] * num
    lengths = [min(width, n - i * width) - p for n, p in zip(aligned.lengths, first, strict=False)]
    if all(n == width for n in lengths):
        return None
    starts = [r * width + p for r, p in enumerate(first)]
    return RowBounds(torch.tensor([starts, lengths]))


def _piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: OVQState,
    bounds: RowBounds | None,
    token_weights: Tensor,
    log_forget: Tensor,
    attend: Attend,
    options: Options,
) -> tuple[Tensor, OVQState]:
    """Outputs of tokens of one chunk of each row, `[R, W, H, V]`, and the state after them."""
    assert state.pending_forget is not None
    lengths = torch.tensor([q.shape[1]] * len(q)) if bounds is None else bounds.bounds[1]
    is_complete = state.num_pending + lengths == options.chunk_size
    # Logs of what is left, at each token, of what was there when the chunk began.
    logs = state.pending_forget[:, None] + log_forget.cumsum(1)
    total = logs[:, -1]
    frame = total * is_complete.to(total.device, total.dtype)[:, None]
    if bool(is_complete.any()):
        state = faded(state, frame)
    o, after = attend(q, k, v, state, bounds, token_weights * (frame[:, None] - logs).exp())
    assert after is not None
    if bool(is_complete.any()):
        after = bounded(after, frees_slots=options.merges_pairs)
    return o, dataclasses.replace(after, pending_forget=total - frame)
