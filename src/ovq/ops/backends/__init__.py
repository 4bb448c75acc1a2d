"""The backends: each a module with two functions. Which of them runs a call is decided only here.

A backend computes what `ovq.ops.naive` defines. The choice affects speed only: assignments are equal between
backends, and outputs are equal up to rounding.

- `naive`: the reference, in plain loops. It alone knows the rules of exact greedy merging.
- `torch`: large matrix products, on any device; `torch/chunk.py` is where to start reading.
- `cpu`: the same, compiled for this processor.
- `triton`: kernels for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from ovq.ops import naive
from ovq.ops.backends import cpu, torch, triton
from ovq.ops.call import Call
from ovq.ops.known import Known
from ovq.ops.options import Options
from ovq.ops.state import OVQState


class Backend(Protocol):
    """What every backend must have; a module or an object.

    Attributes:
        KNOWN: the options that it knows. It is not asked to run others.
    """

    KNOWN: Known

    def missing(self, q: Tensor, v: Tensor, options: Options) -> str | None:
        """What is missing to run what it knows, such as a device, as "expected ..., found ..."; None if
        nothing."""

    def run(self, call: Call) -> tuple[Tensor, OVQState | None]:
        """Outputs `[B, T, H, V]` in the dtype of q, and the state afterwards, perhaps None if not wanted.

        A call has at least one token. Products are made in `full_precision`, whatever PyTorch is set to.
        """


BACKENDS: dict[str, Backend] = {"naive": naive, "torch": torch, "cpu": cpu, "triton": triton}
NAMES = ("auto", *BACKENDS)


def refusal(name: str, q: Tensor, v: Tensor, options: Options, gates: Iterable[str] = ()) -> str | None:
    """Why a backend cannot run calls with such tensors, options and gates; None if it can."""
    backend = BACKENDS[name]
    return backend.KNOWN.refusal(q.dtype, options, gates) or backend.missing(q, v, options)


def chosen(name: str, call: Call, preferred: Sequence[str] | None = None) -> str:
    """The name of the backend that runs a call: the one requested, or the fastest that can.

    Args:
        name: the one requested, or `"auto"`.
        call: the call.
        preferred: which `"auto"` tries, in order; None for all that may be the fastest.

    Raises:
        ValueError: if the requested backend, or for `"auto"` every backend, cannot run the call; says why.
    """
    if name != "auto":
        if reason := refusal(name, call.q, call.v, call.options, call.gates):
            raise ValueError(f"backend: {name!r}: {reason}")
        return name
    for each in preferred or _preferred(call):
        reason = refusal(each, call.q, call.v, call.options, call.gates)
        if reason is None:
            return each
    raise ValueError(f"backend: {each!r}, the last that 'auto' tries: {reason}")


def _preferred(call: Call) -> Sequence[str]:
    """The backends that `"auto"` tries, in order."""
    return "triton" if call.q.is_cuda else "cpu", "torch", "naive"
