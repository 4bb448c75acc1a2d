"""The `cpu` backend: the algorithm of `torch`, compiled for this processor if there is a compiler.

`kernels.py` passes a call to `kernels.cpp`. `build.py` finds this compiled in a wheel, or has `compiler.py`
compile it on first use, together with the layers' operations other than matrix products: short convolution,
norms, SwiGLU, heads (`tokens.py`) and sliding windows (`window.py`).
"""

from __future__ import annotations

from torch import Tensor

from ovq.ops.backends.chunks import Chunks
from ovq.ops.backends.cpu.decode import PreparedStep
from ovq.ops.backends.cpu.kernels import (
    DTYPES,
    CompiledAttention,
    cpu_kernels,
    is_available,
    learn,
)
from ovq.ops.call import Call
from ovq.ops.known import Known
from ovq.ops.narrow import STATE_DTYPES
from ovq.ops.options import Options
from ovq.ops.state import OVQState, advanced
from ovq.ops.transforms import refused_mode

__all__ = ["KNOWN", "LEARNS", "learn", "missing", "run"]

# `naive` and `torch` run the ablations.
KNOWN = Known(
    dtypes=DTYPES,
    growth=("plateau", "linear", "immediate"),
    init=("novelty",),
    merge=("existing", "nearest"),
    gates=("token_weights", "log_forget"),
    state_dtype=STATE_DTYPES,
)
LEARNS = KNOWN


def missing(q: Tensor, v: Tensor, options: Options) -> str | None:
    """Why the kernels cannot run a call that they know (tensors, no compiler, modes); None if they can."""
    if q.device.type != "cpu":
        return f"expected tensors on a CPU, found them on {q.device}"
    if not is_available():
        return f"expected compiled kernels, found none: {cpu_kernels()}"
    return refused_mode()


def run(call: Call) -> tuple[Tensor, OVQState | None]:
    """Run all chunks of all rows in one call of the kernels; decode steps read the state in place."""
    if call.is_decoding:
        # The other kernel would copy the whole dictionary for a single read.
        q, k, v, state, after = call.q, call.k, call.v, call.state, advanced(call.state)
        step = PreparedStep(call.options, (q.shape, k.shape, v.shape), q.dtype, after)
        return step.run(q, k, v, call.scale, call.token_weights, state.num_seen, after)
    chunks = Chunks(call)
    return chunks.results(*CompiledAttention.apply(chunks.fading, *chunks.inputs()))
