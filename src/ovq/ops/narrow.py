"""Sums of slots in fewer bytes: in bfloat16, or in int8 with a scale per slot.

Sums are rounded when tokens are merged into a slot, and only then, as rounding is idempotent in both formats.
So a bfloat16 slot with one token of a bfloat16 model holds that token exactly, and the result does not depend
on how a text is split. Backends merge in the wide dtype and round after each chunk.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

#: Formats of sums, by the names that options have.
STATE_DTYPES = ("float32", "bfloat16", "int8")
#: Scales of int8 sums, by the names of the sums.
STEPS = {"key_sum": "key_step", "value_sum": "value_step"}

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


def check_state_dtype(state_dtype: str, *, forgets: bool) -> None:
    """Raise ValueError unless `state_dtype` is a format of sums, which for sums that fade is float32."""
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype: expected one of {', '.join(STATE_DTYPES)}, found {state_dtype!r}")
    if forgets and state_dtype != "float32":
        raise ValueError(f"state_dtype: expected float32 with forgetting, found {state_dtype}")


def state_dtype_of(dtype: torch.dtype) -> str:
    """Name of the format of sums in `dtype`; sums of float64 models count as float32."""
    return {torch.bfloat16: "bfloat16", torch.int8: "int8"}.get(dtype, "float32")


def rounded_(sums: Tensor, state_dtype: str) -> None:
    """Round wide sums `[..., D]` in place to what the format can hold.

    Example:
        >>> sums = torch.tensor([[254.0, 1.2]])
        >>> rounded_(sums, "int8")
        >>> sums
        tensor([[254.,   2.]])
    """
    if state_dtype != "float32":
        sums.copy_(widened(*narrowed(sums, state_dtype), sums.dtype))


def narrow_slots(slots: Mapping[str, Tensor | None], state_dtype: str) -> dict[str, Tensor | None]:
    """Tensors of slots by name, with `key_sum` and `value_sum` narrowed, and their scales or None."""
    changed = dict(slots)
    for name, step in STEPS.items():
        sums = slots[name]
        assert sums is not None
        changed[name], changed[step] = narrowed(sums, state_dtype)
    return changed


def wide_slots(slots: Mapping[str, Tensor | None], dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Tensors of slots by name, with `key_sum` and `value_sum` in the wide `dtype`, and no scales."""
    changed = dict(slots)
    for name, step in STEPS.items():
        sums = slots[name]
        assert sums is not None
        changed[name], changed[step] = widened(sums, slots.get(step), dtype), None
    return changed
