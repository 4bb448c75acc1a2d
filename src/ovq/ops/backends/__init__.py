"""The backends: each a module with a few functions. Which of them runs a call is decided only here.

A backend computes what `ovq.ops.naive` defines. The choice affects speed only: assignments are equal between
backends, and outputs are equal up to rounding.

- `naive`: the reference, in plain loops. It alone knows the rules of exact greedy merging.
- `torch`: large matrix products, on any device; `torch/chunk.py` is where to start reading.
- `cpu`: the same, compiled for this processor.
- `triton`: kernels for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor

from ovq.ops import naive
from ovq.ops.backends import cpu, torch, triton
from ovq.ops.backends.learned import Learned, Merging
from ovq.ops.call import Call
from ovq.ops.known import Known
from ovq.ops.options import Options
from ovq.ops.precision import full_precision
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


class Learning(Backend, Protocol):
    """A backend that can also merge without reading.

    Attributes:
        LEARNS: the options that it knows then.
    """

    LEARNS: Known

    def learn(self, chunks: Merging) -> Learned:
        """Merge chunks, and say where their tokens went."""


LEARNING: dict[str, Learning] = {"cpu": cpu, "torch": torch, "triton": triton}
BACKENDS: dict[str, Backend] = {"naive": naive, "torch": torch, "cpu": cpu, "triton": triton}
NAMES = ("auto", *BACKENDS)


def refusal(name: str, q: Tensor, v: Tensor, options: Options, gates: Iterable[str] = ()) -> str | None:
    """Why a backend cannot run calls with such tensors, options and gates; None if it can."""
    backend = BACKENDS[name]
    return backend.KNOWN.refusal(q.dtype, options, gates) or backend.missing(q, v, options)


def chosen(name: str, call: Call) -> str:
    """The name of the backend that runs a call: the one requested, or the fastest that can.

    Args:
        name: the one requested, or `"auto"`.

    Raises:
        ValueError: if the requested backend, or for `"auto"` every backend, cannot run the call; says why.
    """
    names = (*_fastest(call.q), "naive")
    return _first(name, names, lambda x: refusal(x, call.q, call.v, call.options, call.gates))


def chosen_to_learn(name: str, k: Tensor, v: Tensor, options: Options, gates: Iterable[str] = ()) -> str:
    """The name of the backend that merges without reading: one of `LEARNING`, or the fastest that can.

    Raises:
        ValueError: as `chosen`.
    """

    def reason_against(name: str) -> str | None:
        backend = LEARNING[name]
        return backend.LEARNS.refusal(k.dtype, options, gates) or backend.missing(k, v, options)

    return _first(name, _fastest(k), reason_against)


def learn(chunks: Merging, name: str | None = None) -> Learned:
    """Merge complete chunks into dictionaries without reading, and say where their tokens went.

    Args:
        name: what `chosen_to_learn` returned for them; None to ask it for the fastest backend.
    """
    if name is None:
        name = chosen_to_learn("auto", chunks.k, chunks.v, chunks.plan.options, chunks.gates)
    with full_precision(chunks.k.device):
        return LEARNING[name].learn(chunks)


def _fastest(x: Tensor) -> tuple[str, str]:
    """The backends that `"auto"` tries for such tensors, in order."""
    return "triton" if x.is_cuda else "cpu", "torch"


def _first(name: str, names: Iterable[str], reason_against: Callable[[str], str | None]) -> str:
    """`name`, or for `"auto"` the first of `names` that there is no reason against."""
    if name != "auto":
        if reason := reason_against(name):
            raise ValueError(f"backend: {name!r}: {reason}")
        return name
    for each in names:
        reason = reason_against(each)
        if reason is None:
            return each
    raise ValueError(f"backend: {each!r}, the last that 'auto' tries: {reason}")
