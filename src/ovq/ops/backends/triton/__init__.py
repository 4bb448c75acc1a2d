"""The `triton` backend: GPU kernels, imported only when a call needs them.

This file imports neither Triton nor the kernels; it tells whether they can run a call, and if not, why. Start
reading at `passes.py`; `docs/method/triton.md` explains how the work is divided and what limits its speed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import torch
from torch import Tensor

from ovq.ops.backends.chunks import Chunks
from ovq.ops.backends.learned import Learned, Merging
from ovq.ops.call import Call
from ovq.ops.known import Known
from ovq.ops.narrow import STATE_DTYPES
from ovq.ops.options import Options
from ovq.ops.precision import full_precision
from ovq.ops.state import OVQState

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Maximum head size whose blocks fit in registers and shared memory.
MAX_HEAD_DIM = 256
# One program ranks all keys of a chunk.
MAX_CHUNK_SIZE = 4096
# `naive` and `torch` run the ablations.
KNOWN = Known(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    growth=("plateau", "linear", "immediate"),
    init=("novelty",),
    merge=("existing", "nearest"),
    gates=("token_weights", "log_forget"),
    state_dtype=STATE_DTYPES,
)
# `run` gets `log_forget` as token weights, chunk by chunk (`forget.py`); `learn` does not support it.
LEARNS = dataclasses.replace(KNOWN, gates=("token_weights",))


def run(call: Call) -> tuple[Tensor, OVQState | None]:
    """Run a decode step (one token per row, no gradients) in one launch, any other call chunk by chunk."""
    # Imported only here, so that nothing else needs Triton or a GPU.
    from ovq.ops.backends.triton.chunk import ChunkAttention
    from ovq.ops.backends.triton.decode import decode_step

    with full_precision(call.q.device):
        if call.is_decoding:
            return decode_step(call)
        chunks = Chunks(call)
        return chunks.results(*ChunkAttention.apply(*chunks.inputs()))


def learn(chunks: Merging) -> Learned:
    """Merge complete chunks and return the slots of their tokens."""
    from ovq.ops.backends.triton import passes

    assert chunks.fading is None, "not among `LEARNS`"
    return passes.learn(chunks)


def missing(q: Tensor, v: Tensor, options: Options) -> str | None:
    """Missing requirement to run a supported call (Triton, a GPU, sizes within bounds); None if none."""
    if not HAS_TRITON:
        return "expected the package triton to be installed (pip install 'ovq[triton]'), found none"
    is_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if not q.is_cuda and not is_interpreted:
        return (
            "expected tensors on a CUDA device (or TRITON_INTERPRET=1 in the environment of the process, to "
            f"try the kernels without one), found them on {q.device}"
        )
    for name, dim in (("key", q.shape[-1]), ("value", v.shape[-1])):
        if dim > MAX_HEAD_DIM:
            return f"expected a {name} dimension of at most {MAX_HEAD_DIM}, found {dim}"
    if options.chunk_size > MAX_CHUNK_SIZE:
        return f"expected chunk_size of at most {MAX_CHUNK_SIZE}, found {options.chunk_size}"
    return None
