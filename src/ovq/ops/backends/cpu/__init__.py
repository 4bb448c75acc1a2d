"""The `cpu` backend: the algorithm of `torch`, compiled for this processor if there is a compiler.

`kernels.py` passes a call to `kernels.cpp`; `build.py` finds it compiled in a wheel, or has `compiler.py`
compile it on first use, together with what the layers do beside their products: short convolution, norms,
SwiGLU, heads (`tokens.py`) and sliding windows (`window.py`).
"""

from __future__ import annotations

from torch import Tensor

from ovq.ops.backends.chunks import in_chunks
from ovq.ops.backends.cpu.build import MissingKernelsWarning
from ovq.ops.backends.cpu.convolution import CompiledConvolution, can_convolve, convolution_step
from ovq.ops.backends.cpu.decode import decode_step
from ovq.ops.backends.cpu.kernels import (
    DTYPES,
    compiled_attention,
    cpu_kernels,
    is_available,
    learn_and_say,
)
from ovq.ops.backends.cpu.layer import (
    LayerStep,
    LayerWeights,
    TokenMemory,
    layer_to_run,
    memory_of_slots,
    memory_of_window,
    run_layers,
)
from ovq.ops.backends.cpu.linear import (
    FEW_TOKENS,
    FasterLinear,
    few_products,
    has_faster_products,
    linear_in_graph,
    mlp_step,
    product,
)
from ovq.ops.backends.cpu.tokens import CompiledHeads, CompiledRMSNorm, CompiledSwiGLU, applied, can_run
from ovq.ops.backends.cpu.window import CompiledWindow
from ovq.ops.call import Call
from ovq.ops.state import OVQState

__all__ = [
    "FEW_TOKENS",
    "CompiledConvolution",
    "CompiledHeads",
    "CompiledRMSNorm",
    "CompiledSwiGLU",
    "CompiledWindow",
    "FasterLinear",
    "LayerStep",
    "LayerWeights",
    "MissingKernelsWarning",
    "TokenMemory",
    "applied",
    "can_convolve",
    "can_run",
    "convolution_step",
    "cpu_kernels",
    "few_products",
    "has_faster_products",
    "layer_to_run",
    "learn_and_say",
    "linear_in_graph",
    "memory_of_slots",
    "memory_of_window",
    "mlp_step",
    "product",
    "refusal",
    "run",
    "run_layers",
]

_MERGES = ("existing", "updated", "ward", "ward-sqrt")


def refusal(call: Call) -> str | None:
    """Why the kernels cannot run a call; None if they can."""
    if call.q.device.type != "cpu":
        return f"expected tensors on a CPU, found them on {call.q.device}"
    if call.q.dtype not in DTYPES:
        return f"expected a dtype of {DTYPES}, found {call.q.dtype}"
    for name in ("bias", "rate"):
        if (found := getattr(call.options, name)) != "count":
            return f"expected {name} 'count', found {found!r}"
    if call.options.merge not in _MERGES:
        return f"expected merge to be one of {_MERGES}, found {call.options.merge!r}"
    return None if is_available() else f"expected compiled kernels, found none: {cpu_kernels()}"


def run(call: Call) -> tuple[Tensor, OVQState | None]:
    """Run all chunks of all rows in one call of the kernels; decode steps read the state in place."""
    if call.is_decoding:
        # The other kernel would copy the whole dictionary for a single read.
        return decode_step(call)
    return in_chunks(call, compiled_attention)
