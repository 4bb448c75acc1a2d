"""Selection of the backend that runs a call, and a record of the last one used."""

from __future__ import annotations

import dataclasses
import functools

from torch import Tensor

from ovq.ops import backends
from ovq.ops.call import Call, Run
from ovq.ops.forget import forgetful_attention
from ovq.ops.splits import groups_of, has_few_tokens, in_groups, token_by_token
from ovq.ops.state import OVQState

_used: str | None = None


def backend_used() -> str | None:
    """Name of the backend that ran the last `ovq_attention` call of this process.

    One of `"naive"`, `"torch"`, `"cpu"` and `"triton"`; None before the first call.

    Example:
        >>> import torch
        >>> from ovq.ops import ovq_attention
        >>> x = torch.randn(1, 4, 1, 8, dtype=torch.float64)
        >>> _ = ovq_attention(x, x, x, num_slots=4, chunk_size=2)
        >>> backend_used()
        'torch'
    """
    return _used


def note_backend(name: str) -> None:
    """Set the result of `backend_used`, for code that runs a backend without `run_of`."""
    global _used
    _used = name


def run_of(call: Call, backend: str) -> Run:
    """Function that runs a call: the requested backend, or for `"auto"` the fastest one that supports it."""
    name = backends.chosen(backend, call)
    note_backend(name)
    run = backends.BACKENDS[name].run
    if not any(call.rows.lengths):
        return _nothing_read
    has_steps = name == "cpu" and has_few_tokens(call)
    # Kernels read narrow sums in decode steps alone.
    reads_narrow = has_steps or (name in ("cpu", "triton") and call.is_decoding)
    if call.options.state_dtype != "float32" and not reads_narrow:
        run = functools.partial(_in_wide_dtype, run=run)
    # The reference implements forgetting itself; kernels for several tokens and without gradients.
    is_by_kernels = name == "cpu" and not (has_steps or call.is_one_token or call.wants_gradients)
    does_forget = name == "naive" or is_by_kernels
    if call.log_forget is not None and not does_forget:
        run = functools.partial(forgetful_attention, run=run)
    if has_steps:
        return functools.partial(token_by_token, run=run)
    groups = groups_of(call)
    return run if len(groups) < 2 else functools.partial(in_groups, run=run, groups=groups)


def _in_wide_dtype(call: Call, run: Run) -> tuple[Tensor, OVQState | None]:
    """A call whose sums are narrow; backends round them after each chunk, so narrowing them loses nothing."""
    o, state = run(dataclasses.replace(call, state=call.state.to_state_dtype("float32")))
    return o, None if state is None else state.to_state_dtype(call.options.state_dtype)


def _nothing_read(call: Call) -> tuple[Tensor, OVQState]:
    """Results of a call without tokens, on every backend; all gradients are zero."""
    o = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
    if call.wants_gradients:
        # Sums over empty slices connect outputs to inputs, and a NaN at padding cannot enter.
        o = o + sum(x.flatten()[:0].sum() for x in call.floats)
    return o, call.state
