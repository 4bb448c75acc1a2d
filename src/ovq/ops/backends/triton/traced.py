"""A call as `torch.compile` and `torch.export` see it: nothing that looks at values, one operator.

Only a call without a state: a state is plain Python in part, and breaks the graph.
"""

from __future__ import annotations

from torch import Tensor

from ovq.ops.backends.triton import library
from ovq.ops.call import RowBounds
from ovq.ops.options import Options


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    attention_mask: Tensor | RowBounds | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> Tensor:
    """Outputs `[B, T, H, V]`; arguments as of `ovq.ops.ovq_attention`, checked but for those of the rows."""
    if isinstance(attention_mask, RowBounds):
        bounds = attention_mask.bounds
    else:
        bounds = library.row_bounds(q, attention_mask, cu_seqlens)
    return library.attention(q, k, v, scale, bounds, options.num_slots, options.chunk_size, options.growth)[0]
