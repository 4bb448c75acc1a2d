"""A call as `torch.compile` and `torch.export` see it: one operator, and no code that depends on values.

Only for calls without a state: a state is partly plain Python, which breaks the graph.
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
    """Outputs `[B, T, H, V]`; arguments as for `ovq.ops.ovq_attention`, checked except for the rows."""
    if isinstance(attention_mask, RowBounds):
        bounds = attention_mask.bounds
    else:
        bounds = library.row_bounds(q, attention_mask, cu_seqlens)
    # Dynamo guards both, so that a graph made for one is not used for the other.
    is_kept = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, scale))
    return library.attention(
        q,
        k,
        v,
        scale,
        bounds,
        options.num_slots,
        options.chunk_size,
        options.growth,
        options.merge,
        options.value_weight,
        is_kept,
    )[0]
