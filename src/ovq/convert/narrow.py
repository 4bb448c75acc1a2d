"""Sums of slots in fewer bytes: in bfloat16, or in int8 with the length of a step per slot.

Sums are rounded each time that tokens are merged into a slot, and only then: rounding what was rounded
changes nothing, in either format. So a slot that holds one token of a bfloat16 model is that token exactly in
bfloat16, and what is kept does not depend on how a text is split.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Formats of sums, as `MemoryConfig.state_dtype` names them.
STATE_DTYPES = ("float32", "bfloat16", "int8")

# The largest int8 number that has a negative.
_MOST = 127


def narrowed(sums: Tensor, state_dtype: str) -> tuple[Tensor, Tensor | None]:
    """Sums `[..., D]` in a format, and their steps `[...]`, if it is int8.

    Example:
        >>> narrowed(torch.tensor([[127.0, 0.6], [0.0, 0.0]]), "int8")[0]
        tensor([[127,   1],
                [  0,   0]], dtype=torch.int8)
    """
    if state_dtype == "float32":
        # Those of float64 models stay float64.
        return sums, None
    if state_dtype == "bfloat16":
        return sums.bfloat16(), None
    # The largest of a row has 127 steps whichever way they are rounded, so that its steps are found again.
    # Their 8 bits times the 8 of a number are a float32 number.
    steps = (sums.abs().amax(-1) / _MOST).bfloat16()
    each = steps.to(sums.dtype)[..., None]
    # What is not finite makes its row NaN, by the step.
    numbers = (sums / each.masked_fill(each == 0, 1)).round().nan_to_num(0)
    return numbers.to(torch.int8), steps.masked_fill(~sums.isfinite().all(-1), torch.nan)


def widened(sums: Tensor, steps: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sums as `narrowed` has returned them, in a wide format."""
    return sums.to(dtype) if steps is None else sums.to(dtype) * steps.to(dtype)[..., None]
