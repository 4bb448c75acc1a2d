"""The `triton` backend: kernels for GPUs, imported only when a call asks for them.

This file imports neither Triton nor the kernels: it says whether a call can be run by them, and if not, why.
`launch.py` is where to start reading; `docs/triton.md` says how the work is cut and what bounds it.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ovq.ops.rules import Rules

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Sizes of a head that the blocks of the kernels fit in registers and shared memory.
MAX_HEAD_DIM = 256
# Keys of a chunk are ranked by one program.
MAX_CHUNK_SIZE = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(q: Tensor, v: Tensor, rules: Rules) -> str | None:
    """Why the kernels cannot run a call, as "expected ..., found ..."; None if they can.

    Args:
        q: `[B, T, H, K]` queries.
        v: `[B, T, Hkv, V]` values.
        rules: the layer's settings.

    Example:
        >>> from ovq.ops.rules import Rules
        >>> x = torch.zeros(1, 4, 1, 512)
        >>> rules = Rules(
        ...     num_slots=8, chunk_size=4, growth="plateau", init="novelty", merge="existing", seed=0
        ... )
        >>> refusal(x, x, rules) is None
        False
    """
    if not HAS_TRITON:
        return "expected the package triton to be installed (pip install 'ovq[triton]'), found none"
    if not q.is_cuda and not _is_interpreting():
        return (
            "expected tensors on a CUDA device (or TRITON_INTERPRET=1 in the environment of the process, to "
            f"try the kernels without one), found them on {q.device}"
        )
    if q.dtype not in _DTYPES:
        return f"expected a dtype of {_DTYPES}, found {q.dtype}"
    for name, dim in (("key", q.shape[-1]), ("value", v.shape[-1])):
        if dim > MAX_HEAD_DIM:
            return f"expected a {name} dimension of at most {MAX_HEAD_DIM}, found {dim}"
    if rules.chunk_size > MAX_CHUNK_SIZE:
        return f"expected chunk_size of at most {MAX_CHUNK_SIZE}, found {rules.chunk_size}"
    # The ablations run through the other backends.
    for name, expected in (("init", "novelty"), ("merge", "existing"), ("bias", "count"), ("rate", "count")):
        found = getattr(rules, name)
        if found != expected:
            return f"expected {name} {expected!r}, found {found!r}"
    return None


@torch.compiler.assume_constant_result
def _is_interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
