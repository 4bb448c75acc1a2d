"""A call as `torch.compile` and `torch.export` see it: nothing that looks at values, one operator.

Only a call without a state: a state is plain Python in part, and breaks the graph.
"""

from __future__ import annotations

import torch
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
    num_rows, chunk_size = bounds.shape[1], options.chunk_size
    # Room enough whatever the lengths are, and all slots there could be: the graph fits every length.
    places = q.shape[0] * q.shape[1] + num_rows * (chunk_size - 1)
    wide = {"dtype": torch.float32}
    streams = (num_rows, k.shape[2])
    return library.attention(
        q,
        k,
        v,
        scale,
        k.new_zeros(*streams, 0, k.shape[3], **wide),
        v.new_zeros(*streams, 0, v.shape[3], **wide),
        k.new_zeros(*streams, 0, dtype=torch.int64),
        k.new_zeros(*streams, chunk_size, k.shape[3]),
        v.new_zeros(*streams, chunk_size, v.shape[3]),
        torch.zeros(num_rows, dtype=torch.int64, device="cpu"),
        bounds,
        options.num_slots,
        chunk_size,
        options.growth,
        options.num_slots,
        places,
    )[0]
