"""Who runs the op: a new backend is one more entry of `BACKENDS`."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from unittest import mock

from ovq.ops import cpu_kernels
from ovq.ops.backends.cpu import build
from ovq.ops.backends.triton import HAS_TRITON


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to run the op.

    Attributes:
        name: what the command line calls it.
        op: `backend` of `ovq_attention`.
        dtypes: names of the dtypes to draw from; those named twice are drawn twice as often.
        has_kernels: whether the compiled kernels may run, where a model chooses.
        has_options: whether it knows the options of the ablations, beside the rules that merge pairs,
            which all know.
        kinds: of programs it runs.
        is_slow: whether programs must be tiny.
    """

    name: str
    op: str
    dtypes: tuple[str, ...] = ("float64", "float32", "float32", "bfloat16", "float16")
    has_kernels: bool = True
    has_options: bool = True
    kinds: tuple[str, ...] = ("op", "states", "caches")
    is_slow: bool = False

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Calls inside run this backend, given that they ask for `op`."""
        with contextlib.ExitStack() as stack:
            if not self.has_kernels:
                missing = build.SwitchedOff("by the fuzzer")
                stack.enter_context(mock.patch.object(build, "load", side_effect=missing))
            if self.op == "triton":
                # Triton's interpreter computes with NumPy, which warns of what is not a number.
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", RuntimeWarning)
            yield

    def known(self, options: dict[str, float | str]) -> dict[str, float | str]:
        """Those of drawn `options` that it knows; the others stay as they are by default."""
        if self.has_options:
            return options
        names = ("merge", "value_weight") if options["merge"] == "nearest" else ()
        return {name: options[name] for name in names}

    def missing(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.op == "triton" and not HAS_TRITON:
            return "the extra ovq[triton] is not installed"
        if self.name == "cpu" and "compiled" not in cpu_kernels():
            return cpu_kernels()
        return None


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(name="naive", op="naive"),
        # "auto" takes the compiled kernels for all that they run: all but float64.
        Backend(name="cpu", op="auto", dtypes=("float32", "float32", "bfloat16", "float64", "float16")),
        Backend(name="torch", op="torch", has_kernels=False),
        Backend(
            name="triton",
            op="triton",
            dtypes=("float32", "float32", "bfloat16", "float16"),
            has_options=False,
            # Models are in float64 here, which the kernels do not know.
            kinds=("op", "states"),
            is_slow=True,
        ),
    )
}
