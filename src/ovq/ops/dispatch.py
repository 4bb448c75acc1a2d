"""Which backend runs a call, and which ran the last one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

from torch import Tensor

from ovq.ops import backends
from ovq.ops.call import Call, Request
from ovq.ops.checks import checked_call
from ovq.ops.fading import checked_log_forget
from ovq.ops.forget import forgetful_attention
from ovq.ops.precision import full_precision
from ovq.ops.state import OVQState

_used: str | None = None


def backend_used() -> str | None:
    """The backend that ran the last `ovq_attention` call of this process.

    It is `"naive"`, `"torch"`, `"cpu"` or `"triton"`; None before the first call.

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
    """Make `name` what `backend_used` returns, for calls that other code runs."""
    global _used
    _used = name


def attention(request: Request) -> tuple[Tensor, OVQState | None]:
    """What `ovq_attention` returns."""
    call = checked_call(
        request.q,
        request.k,
        request.v,
        request.scale,
        request.initial_state,
        request.output_final_state,
        request.attention_mask,
        request.cu_seqlens,
        request.options,
        request.token_weights,
    )
    run = functools.partial(_run, request.backend)
    if request.log_forget is None and call.state.pending_forget is None:
        o, state = run(call)
    else:
        logs = checked_log_forget(request.log_forget, call)
        wants_gradients = dataclasses.replace(call, log_forget=logs).wants_gradients
        # Only the compiled kernels fade dictionaries themselves, and they have no gradients of it.
        is_one_call = not wants_gradients and backends.chosen(request.backend, call) == "cpu"
        o, state = forgetful_attention(call, logs, run, is_one_call=is_one_call)
    return o, state if request.output_final_state else None


def _run(backend: str, call: Call) -> tuple[Tensor, OVQState | None]:
    """A call by the backend that is asked for, or the fastest that can run it."""
    name = backends.chosen(backend, call)
    note_backend(name)
    # The compiled kernels use no product of PyTorch.
    with contextlib.nullcontext() if name == "cpu" else full_precision(call.q.device):
        return backends.BACKENDS[name].run(call)
