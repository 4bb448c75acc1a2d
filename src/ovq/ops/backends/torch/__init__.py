"""The `torch` backend: large matrix products on any device, with a backward in O(T) memory.

`chunk.py` is where to start reading: chunk by chunk, `read.py` reads, `route.py` decides where keys go. One
token per row goes through `decode.py`; `learn.py` merges without reading; `constant_rate.py` is an ablation.
"""

from __future__ import annotations

from torch import Tensor

from ovq.ops.backends.chunks import in_chunks
from ovq.ops.backends.torch.chunk import chunk_attention
from ovq.ops.backends.torch.constant_rate import constant_rate_attention
from ovq.ops.backends.torch.decode import decode_step
from ovq.ops.backends.torch.learn import learn
from ovq.ops.call import Call
from ovq.ops.options import unlisted
from ovq.ops.state import OVQState

__all__ = ["learn", "refusal", "run"]

_LISTED = {
    "growth": ("plateau", "linear", "immediate"),
    "init": ("novelty", "random"),
    "merge": ("existing", "updated", "nearest"),
    "bias": ("count", "count+norm"),
    "rate": ("count", "number"),
}


def refusal(call: Call) -> str | None:
    """Why it cannot run a call: options that came after it; None if it can."""
    return unlisted(call.options, _LISTED)


def run(call: Call) -> tuple[Tensor, OVQState | None]:
    """One token per row without gradients is decoded; everything else goes chunk by chunk."""
    if call.is_decoding:
        return decode_step(call)
    return in_chunks(call, chunk_attention if call.options.rate == "count" else constant_rate_attention)
