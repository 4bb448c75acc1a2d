"""The backends, each a module with a few functions, and the selection of the one that runs a call.

Backends compute what `ovq.ops.naive` defines and differ only in speed: slot assignments are equal between
backends, and outputs are equal up to rounding.

- `naive`: the reference, in plain loops. Only it supports the rules of exact greedy merging.
- `torch`: large matrix products, on any device; start reading at `torch/chunk.py`.
- `cpu`: the same, compiled for this processor.
- `triton`: GPU kernels.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor

from ovq.ops import naive
from ovq.ops.backends import cpu, torch, triton
from ovq.ops.backends.learned import Learned, Merging
from ovq.ops.call import Call
from ovq.ops.checks import is_memory
from ovq.ops.known import Known
from ovq.ops.options import Options
from ovq.ops.precision import full_precision
from ovq.ops.state import OVQState
from ovq.ops.transforms import refused_transform


class Backend(Protocol):
    """Interface of a backend, a module or an object.

    Attributes:
        KNOWN: the supported options. The backend never receives a call with others.
    """

    KNOWN: Known

    def missing(self, q: Tensor, v: Tensor, options: Options) -> str | None:
        """Missing requirement for a supported call (device, compiler): "expected ..., found ..."; or None."""

    def run(self, call: Call) -> tuple[Tensor, OVQState | None]:
        """Outputs `[B, T, H, V]` in the dtype of q, and the final state (may be None if not wanted).

        A call has at least one token. Matrix products run in `full_precision`, whatever PyTorch's settings.
        """


class Learning(Backend, Protocol):
    """A backend that can also merge tokens without computing attention.

    Attributes:
        LEARNS: the options supported by `learn`.
    """

    LEARNS: Known

    def learn(self, chunks: Merging) -> Learned:
        """Merge chunks and return the slots of their tokens."""


LEARNING: dict[str, Learning] = {"cpu": cpu, "torch": torch, "triton": triton}
BACKENDS: dict[str, Backend] = {"naive": naive, "torch": torch, "cpu": cpu, "triton": triton}
NAMES = ("auto", *BACKENDS)


def refusal(name: str, q: Tensor, v: Tensor, options: Options, gates: Iterable[str] = ()) -> str | None:
    """Why a backend cannot run calls with these tensors, options and gates; None if it can."""
    backend = BACKENDS[name]
    reason = backend.KNOWN.refusal(q.dtype, options, gates) or backend.missing(q, v, options)
    return reason or refused_transform(is_plain=name == "naive")


def _unread(name: str, tensors: Sequence[Tensor]) -> str | None:
    """Why kernels cannot read these tensors, if the backend has kernels; None if it can read all."""
    if name not in ("cpu", "triton") or all(map(is_memory, tensors)):
        return None
    found = next(x for x in tensors if not is_memory(x))
    what = "one that PyTorch negates" if found.is_neg() else type(found).__name__
    return f"expected plain tensors, found {what}"


def chosen(name: str, call: Call) -> str:
    """Name of the backend that runs a call: the requested one, or for `"auto"` the fastest that can run it.

    Args:
        name: the requested backend, or `"auto"`.

    Raises:
        ValueError: if the requested backend, or for `"auto"` every backend, cannot run the call; says why.
    """

    def reason_against(name: str) -> str | None:
        reason = refusal(name, call.q, call.v, call.options, call.gates)
        return reason or _unread(name, call.tensors)

    found = _first(name, (*_fastest(call.q), "naive"), reason_against)
    # Rules that only `naive` knows have no faster backend to miss.
    if found == "naive" != name and not torch.KNOWN.refusal(call.q.dtype, call.options, call.gates):
        _warn_of_loops()
    return found


@functools.cache
def _warn_of_loops() -> None:
    warnings.warn(
        "backend: 'auto' runs the slow loops of 'naive' under transforms of torch.func and forward-mode "
        "differentiation, where other backends have no derivatives; torch.autograd.grad works with all, and "
        "backend='naive' selects the loops without this warning",
        stacklevel=5,
    )


def chosen_to_learn(
    name: str,
    k: Tensor,
    v: Tensor,
    options: Options,
    gates: Iterable[str] = (),
    tensors: Sequence[Tensor] = (),
) -> str:
    """Like `chosen`, for merging without attention: the requested one of `LEARNING`, or the fastest.

    Raises:
        ValueError: as in `chosen`.
    """

    def reason_against(name: str) -> str | None:
        backend = LEARNING[name]
        reason = backend.LEARNS.refusal(k.dtype, options, gates) or backend.missing(k, v, options)
        return reason or _unread(name, tensors) or refused_transform(is_plain=name == "torch")

    return _first(name, _fastest(k), reason_against)


def learn(chunks: Merging, name: str | None = None) -> Learned:
    """Merge complete chunks into dictionaries without computing attention; returns the slots of the tokens.

    Args:
        name: result of `chosen_to_learn` for these chunks; None for the fastest backend.
    """
    if name is None:
        name = chosen_to_learn("auto", chunks.k, chunks.v, chunks.plan.options, chunks.gates)
    with full_precision(chunks.k.device):
        return LEARNING[name].learn(chunks)


def _fastest(x: Tensor) -> tuple[str, str]:
    """Backends that `"auto"` tries for tensors on this device, in order."""
    return "triton" if x.is_cuda else "cpu", "torch"


def _first(name: str, names: Iterable[str], reason_against: Callable[[str], str | None]) -> str:
    """`name`, or for `"auto"` the first of `names` that can run; ValueError if none can."""
    if name != "auto":
        if reason := reason_against(name):
            raise ValueError(f"backend: {name!r}: {reason}")
        return name
    for each in names:
        reason = reason_against(each)
        if reason is None:
            return each
    raise ValueError(f"backend: {each!r}, the last that 'auto' tries: {reason}")
