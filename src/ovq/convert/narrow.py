"""Sums of slots in fewer bytes: in bfloat16, or in int8 with a scale per slot.

Sums are rounded when tokens are merged into a slot, and only then, as rounding is idempotent in both formats.
So a bfloat16 slot with one token of a bfloat16 model holds that token exactly, and the result does not depend
on how a text is split.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Formats of sums, as `MemoryConfig.state_dtype` names them.
STATE_DTYPES = ("float32", "bfloat16", "int8")

# Largest int8 value whose negative is int8 too.
_MOST = 127


def narrowed(sums: Tensor, state_dtype: str) -> tuple[Tensor, Tensor | None]:
    """Sums `[..., D]` in the format `state_dtype`, and for int8 their bfloat16 scales `[...]`, else None.

    Example:
        >>> narrowed(torch.tensor([[127.0, 0.6], [0.0, 0.0]]), "int8")[0]
        tensor([[127,   1],
                [  0,   0]], dtype=torch.int8)
    """
    if state_dtype == "float32":
        # float64 models keep float64 sums.
        return sums, None
    if state_dtype == "bfloat16":
        return sums.bfloat16(), None
    # The largest entry of a row is 127 steps however the scale is rounded, so rounding again finds the same
    # scale. The 8 significant bits of a scale times the 8 bits of an entry are exact in float32.
    scales = (sums.abs().amax(-1) / _MOST).bfloat16()
    each = scales.to(sums.dtype)[..., None]
    # A non-finite entry turns its row into NaN, through the scale.
    numbers = (sums / each.masked_fill(each == 0, 1)).round().nan_to_num(0)
    return numbers.to(torch.int8), scales.masked_fill(~sums.isfinite().all(-1), torch.nan)


def widened(sums: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sums that `narrowed` rounded, in the wide `dtype`."""
    return sums.to(dtype) if scales is None else sums.to(dtype) * scales.to(dtype)[..., None]
