"""Which backend runs a call, and which ran the last one."""

from __future__ import annotations

import contextlib

from torch import Tensor

from ovq.ops import backends
from ovq.ops.call import Call
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


def run(call: Call, backend: str) -> tuple[Tensor, OVQState | None]:
    """What `ovq_attention` returns, by the backend that is asked for, or by the fastest that can."""
    name = backends.chosen(backend, call)
    note_backend(name)
    by_backend = backends.BACKENDS[name].run
    # The compiled kernels use no product of PyTorch.
    with contextlib.nullcontext() if name == "cpu" else full_precision(call.q.device):
        if call.log_forget is None:
            o, state = by_backend(call)
        else:
            # Only the compiled kernels fade dictionaries themselves, and they have no gradients of it.
            is_one_call = name == "cpu" and not call.wants_gradients
            o, state = forgetful_attention(call, by_backend, is_one_call=is_one_call)
    return o, state if call.wants_state else None
