"""A call without a state as `torch.compile` and `torch.export` see it: one operator of these kernels.

Its backward knows what the forward found. Other calls are `ovq.ops.operator`'s, which runs them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.backends.triton import library
from ovq.ops.call import RowBounds
from ovq.ops.options import Options
from ovq.ops.row_bounds import row_bounds


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
        bounds = row_bounds(attention_mask, cu_seqlens, q.shape[0], 0, q.shape[1])
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
