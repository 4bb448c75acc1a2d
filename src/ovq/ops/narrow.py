"""Sums of slots in fewer bytes: in bfloat16, or in int8 with a scale per slot.

Sums are rounded when tokens are merged into a slot, and only then, as rounding is idempotent in both formats.
So a bfloat16 slot with one token of a bfloat16 model holds that token exactly, and the result does not depend
on how a text is split. Backends merge in the wide dtype and round after each chunk.

With forgetting, sums fade chunk by chunk, and a rounded sum would be rounded again each time. So states that
forget hold *means*, the sums divided by the weights of the slots, which do not fade; functions here take the
weights then. Between chunks the wide sums are rounded means times weights. Divided by the same weights they
round to the same means, as the two float32 roundings are far smaller than half a step of either format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.sums import slot_means

#: Formats of sums, by the names that options have.
STATE_DTYPES = ("float32", "bfloat16", "int8")
#: Scales of int8 sums, by the names of the sums.
STEPS = {"key_sum": "key_step", "value_sum": "value_step"}

# Largest int8 value whose negative is int8 too.
MOST = 127
# Smaller scales of int8 sums are 0: they have too few bits for 127 steps to stay within int8.
LEAST_SCALE = torch.finfo(torch.float32).tiny
# Products of means and tiny weights that are smaller are 0: they have too few bits to give the mean again.
LEAST_SUM = 2.0**-138


def narrowed(sums: Tensor, state_dtype: str, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Sums `[..., D]` in the format `state_dtype`, and for int8 their bfloat16 scales `[...]`, else None.

    With the `weight` `[...]` of the slots, narrow formats hold means.

    Example:
        >>> narrowed(torch.tensor([[127.0, 0.6], [0.0, 0.0]]), "int8")[0]
        tensor([[127,   1],
                [  0,   0]], dtype=torch.int8)
        >>> narrowed(torch.tensor([[3.0, 1.0]]), "bfloat16", torch.tensor([2.0]))[0]
        tensor([[1.5000, 0.5000]], dtype=torch.bfloat16)
    """
    if state_dtype == "float32":
        # float64 models keep float64 sums.
        return sums, None
    if weight is not None:
        sums = slot_means(sums, weight)
    if state_dtype == "bfloat16":
        return sums.bfloat16(), None
    # The largest entry of a row is 127 steps however the scale is rounded, so rounding again finds the same
    # scale. The 8 significant bits of a scale times the 8 bits of an entry are exact in float32.
    scales = (sums.abs().amax(-1) / MOST).bfloat16()
    scales = scales.masked_fill(scales < LEAST_SCALE, 0)
    each = scales.to(sums.dtype)[..., None]
    # A non-finite entry turns its row into NaN, through the scale.
    numbers = (sums / each.masked_fill(each == 0, torch.inf)).round().nan_to_num(0)
    return numbers.to(torch.int8), scales.masked_fill(~sums.isfinite().all(-1), torch.nan)


def widened(sums: Tensor, scales: Tensor | None, dtype: torch.dtype, weight: Tensor | None = None) -> Tensor:
    """The sums that `narrowed` rounded, in the wide `dtype`; with `weight`, from means in a narrow format."""
    wide = sums.to(dtype) if scales is None else sums.to(dtype) * scales.to(dtype)[..., None]
    if weight is None or state_dtype_of(sums.dtype) == "float32":
        return wide
    wide = wide * weight[..., None]
    return wide.masked_fill(wide.abs() < LEAST_SUM, 0)


def check_state_dtype(state_dtype: str) -> None:
    """Raise ValueError unless `state_dtype` is a format of sums."""
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype: expected one of {', '.join(STATE_DTYPES)}, found {state_dtype!r}")


def state_dtype_of(dtype: torch.dtype) -> str:
    """Name of the format of sums in `dtype`; sums of float64 models count as float32."""
    return {torch.bfloat16: "bfloat16", torch.int8: "int8"}.get(dtype, "float32")


def rounded_(
    sums: Tensor, state_dtype: str, weight: Tensor | None = None, faded: Tensor | None = None
) -> None:
    """Round wide sums `[..., D]` in place to what the format can hold.

    Args:
        sums: the sums.
        state_dtype: the format.
        weight: `[...]` of the slots if the format holds means.
        faded: new weights that the sums are to fade to; None to keep them.
    """
    if state_dtype != "float32":
        means = narrowed(sums, state_dtype, weight)
        sums.copy_(widened(*means, sums.dtype, weight if faded is None else faded))
