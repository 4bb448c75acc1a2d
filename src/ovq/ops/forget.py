"""Calls of rows that forget, chunk by chunk, by any backend; `fading.py` says how."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.call import RowBounds, Rows
from ovq.ops.fading import begun, ended
from ovq.ops.options import Options
from ovq.ops.state import OVQState, forgetting

# q, k, v, the state, the bounds of rows (None where they fill the input), weights of tokens -> outputs, and
# the state after them.
Attend = Callable[
    [Tensor, Tensor, Tensor, OVQState, RowBounds | None, Tensor], tuple[Tensor, OVQState | None]
]


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
    lengths = torch.tensor([q.shape[1]] * len(q)) if bounds is None else bounds.bounds[1]
    is_complete = state.num_pending + lengths == options.chunk_size
    state, factors, left = begun(state, log_forget, is_complete)
    o, after = attend(q, k, v, state, bounds, token_weights * factors)
    assert after is not None
    return o, ended(after, left, is_complete, options)
