"""The `torch` backend: large matrix products on any device, with a backward in O(T) memory.

Start at `chunk.py`, the loop over chunks: `read.py` computes attention, `route.py` assigns keys to slots.
`decode.py` handles one token per row; `learn.py` merges without attention; `constant_rate.py` is an ablation.
"""

from __future__ import annotations

from torch import Tensor

from ovq.ops.backends.chunks import Chunks
from ovq.ops.backends.torch.chunk import ChunkAttention
from ovq.ops.backends.torch.constant_rate import constant_rate_attention
from ovq.ops.backends.torch.decode import decode_step
from ovq.ops.backends.torch.learn import learn
from ovq.ops.call import Call
from ovq.ops.known import Known
from ovq.ops.narrow import STATE_DTYPES
from ovq.ops.options import Options
from ovq.ops.precision import full_precision
from ovq.ops.state import OVQState
from ovq.ops.sums import DTYPES

__all__ = ["KNOWN", "LEARNS", "learn", "missing", "run"]

KNOWN = Known(
    dtypes=DTYPES,
    growth=("plateau", "linear", "immediate"),
    init=("novelty", "random"),
    merge=("existing", "updated", "nearest"),
    bias=("count", "count+norm"),
    rate=("count", "number"),
    gates=("token_weights", "log_forget"),
    state_dtype=STATE_DTYPES,
)
LEARNS = KNOWN


def missing(q: Tensor, v: Tensor, options: Options) -> str | None:
    """None: this backend runs on every device."""
    return None


def run(call: Call) -> tuple[Tensor, OVQState | None]:
    """Run a decode step (one token per row, no gradients) at once, any other call chunk by chunk."""
    with full_precision(call.q.device):
        if call.is_decoding:
            return decode_step(call)
        chunks = Chunks(call)
        is_rewound = call.options.ablation.rate == "count"
        attention = ChunkAttention.apply if is_rewound else constant_rate_attention
        return chunks.results(*attention(*chunks.inputs()))
