"""Calls with `log_forget`, chunk by chunk, for backends that cannot run them as a whole; see `fading.py`."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.call import Call, Rows, Run
from ovq.ops.fading import begun, ended
from ovq.ops.state import OVQState


def forgetful_attention(call: Call, run: Run) -> tuple[Tensor, OVQState]:
    """Outputs `[B, T, H, V]` and final state of a call with `log_forget`; `run` runs each chunk.

    The token weights of the call also apply when its chunks are read. With gradients, autograd keeps the
    faded dictionary of each chunk.
    """
    state, weights, log_forget, options = call.state, call.token_weights, call.log_forget, call.options
    assert weights is not None
    assert log_forget is not None
    if call.wants_gradients and any(x.is_inference() for x in call.floats):
        # Autograd saves the faded tensors, and cannot save inference tensors.
        state = state.clone()
    call = dataclasses.replace(call, state=state, wants_state=True)
    if call.is_one_token:
        return _piece(call, run)
    aligned = AlignedRows(
        call.rows,
        pending=state.num_pending.tolist(),
        chunk_size=options.chunk_size,
        num_tokens=call.num_tokens,
    )
    if not aligned.is_sorted:
        state = state.select(aligned.order)
    # Chunks in the order in which they are run: the i-th ones of all rows that have one.
    places = [
        [first + i for first in aligned.first_chunk[: aligned.num_active(i)]]
        for i in range(aligned.chunks_of(0))
    ]
    index = torch.tensor(list(itertools.chain(*places)), device=call.q.device)
    tensors = (call.q, call.k, call.v, weights[..., None], log_forget[..., None])
    # Selected at once, as the gradient of each selection is as large as the whole.
    chunks = [aligned.align(x, None).index_select(0, index).split([*map(len, places)]) for x in tensors]
    outputs: list[Tensor] = []
    finished: list[OVQState] = []
    for i, (q, k, v, of_tokens, logs) in enumerate(zip(*chunks, strict=True)):
        num = len(q)
        if num < state.batch_size:
            finished.append(state.select(range(num, state.batch_size)))
            state = state.select(range(num))
        piece = dataclasses.replace(
            call,
            q=q,
            k=k,
            v=v,
            state=state,
            rows=_rows(aligned, i, num),
            token_weights=of_tokens[..., 0],
            log_forget=logs[..., 0],
        )
        o, state = _piece(piece, run)
        outputs.append(o)
    finished.append(state)
    state = OVQState.concatenate(finished[::-1])
    o = aligned.unalign(torch.cat(outputs).index_select(0, index.argsort()), *call.q.shape[:2])
    return o, state if aligned.is_sorted else state.select(aligned.inverse())


def _rows(aligned: AlignedRows, i: int, num: int) -> Rows:
    """Ranges of the new tokens of the first `num` rows within their i-th chunks."""
    width = aligned.width
    first = aligned.pending[:num] if i == 0 else [0] * num
    lengths = [min(width, n - i * width) - p for n, p in zip(aligned.lengths, first, strict=False)]
    return Rows(tuple(r * width + p for r, p in enumerate(first)), tuple(lengths))


def _piece(call: Call, run: Run) -> tuple[Tensor, OVQState]:
    """Outputs `[R, W, H, V]` for tokens of one chunk of each row, and the state after them."""
    assert call.token_weights is not None
    assert call.log_forget is not None
    lengths = torch.tensor(call.rows.lengths, device="cpu")
    is_complete = call.state.num_pending + lengths == call.options.chunk_size
    state, weights, left = begun(call.state, call.token_weights, call.log_forget, is_complete)
    o, after = run(dataclasses.replace(call, state=state, token_weights=weights, log_forget=None))
    assert after is not None
    return o, ended(after, left, is_complete, call.options)
