"""The backends: each a module with two functions. Which of them runs a call is decided only here.

A backend computes what `ovq.ops.naive` defines. The choice affects speed only: assignments are equal between
backends, and outputs are equal up to rounding.

- `naive`: the reference, in plain loops. It alone knows the rules of exact greedy merging.
- `torch`: large matrix products, on any device; `torch/chunk.py` is where to start reading.
- `cpu`: the same, compiled for this processor.
- `triton`: kernels for GPUs.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ovq.ops import naive
from ovq.ops.backends import cpu, torch, triton
from ovq.ops.call import Call
from ovq.ops.state import OVQState


class Backend(Protocol):
    """What every backend must have; a module or an object."""

    def refusal(self, call: Call) -> str | None:
        """Why the backend cannot run a call, as "expected ..., found ..."; None if it can."""

    def run(self, call: Call) -> tuple[Tensor, OVQState | None]:
        """Outputs `[B, T, H, V]` in the dtype of q, and the state afterwards, or None if not wanted."""


BACKENDS: dict[str, Backend] = {"naive": naive, "torch": torch, "cpu": cpu, "triton": triton}
NAMES = ("auto", *BACKENDS)


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is that of a backend, or `"auto"`."""
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {NAMES}, found {name!r}")


def chosen(name: str, call: Call) -> str:
    """The name of the backend that runs a call: the one requested, or the fastest that can.

    Raises:
        ValueError: if the requested backend, or for `"auto"` every backend, cannot run the call; says why.
    """
    check_name(name)
    if name != "auto":
        if reason := BACKENDS[name].refusal(call):
            raise ValueError(f"backend: {name!r}: {reason}")
        return name
    for preferred in _preferred(call):
        reason = BACKENDS[preferred].refusal(call)
        if reason is None:
            return preferred
    raise ValueError(f"backend: {preferred!r}, the last that 'auto' tries: {reason}")


def _preferred(call: Call) -> list[str]:
    """The backends that `"auto"` tries, in order."""
    return ["triton" if call.q.is_cuda else "cpu", "torch", "naive"]
