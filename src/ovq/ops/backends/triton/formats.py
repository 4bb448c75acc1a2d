"""Sums of slots in bfloat16 and int8 (`ovq.ops.narrow`): kernels round them after each chunk."""

import triton
import triton.language as tl

from ovq.ops import narrow
from ovq.ops.backends.triton.common import means, rows

MOST = tl.constexpr(float(narrow.MOST))
LEAST_SCALE = tl.constexpr(narrow.LEAST_SCALE)
LEAST_SUM = tl.constexpr(narrow.LEAST_SUM)
# Adding and subtracting 1.5 * 2^23 rounds smaller numbers to integers, ties to even.
_TO_INTEGER = tl.constexpr(12582912.0)


@triton.jit
def _to_bfloat16(x):
    """float32 rounded to the nearest bfloat16, ties to even; the interpreter's own conversion truncates."""
    bits = x.to(tl.int32, bitcast=True)
    nearest = ((bits + 32767 + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return tl.where(x == x, nearest, x)


@triton.jit
def _to_int8(x):
    """Rows `[N, D]` rounded to int8 with a bfloat16 scale per row; rows that are not finite become NaN."""
    is_finite = tl.abs(x) < float("inf")
    x = tl.where(is_finite, x, 0.0)
    most = tl.max(tl.abs(x), 1)
    scale = _to_bfloat16(tl.div_rn(most, MOST + tl.zeros_like(most)))
    scale = tl.where(scale < LEAST_SCALE, 0.0, scale)
    divisor = tl.where(scale > 0, scale, float("inf"))[:, None] + tl.zeros_like(x)
    numbers = (tl.div_rn(x, divisor) + _TO_INTEGER) - _TO_INTEGER
    is_row = tl.min(is_finite.to(tl.int32), 1) > 0
    return tl.where(is_row[:, None], numbers * scale[:, None], float("nan"))


@triton.jit
def in_format(sums, mass, FORMAT: tl.constexpr, HAS_MEANS: tl.constexpr):
    """Sums `[N, D]` rounded to what a format can hold, bitwise as `narrow.rounded_` does.

    Args:
        sums: in float32.
        mass: `[N]` counts or weights of the slots.
        FORMAT: index in `STATE_DTYPES`.
        HAS_MEANS: whether the format holds means, as it does with forgetting.
    """
    x = sums
    if FORMAT != 0:
        if HAS_MEANS:
            x = means(x, mass)
        if FORMAT == 1:
            x = _to_bfloat16(x)
        else:
            x = _to_int8(x)
        if HAS_MEANS:
            x = x * mass.to(tl.float32)[:, None]
            x = tl.where(tl.abs(x) < LEAST_SUM, 0.0, x)
    return x


@triton.jit
def wide_rows(sums, steps, index, mask, D, BD: tl.constexpr):
    """`rows` of sums in any format as float32; `steps` are the scales of int8 sums, or None."""
    x = rows(sums, index, mask, D, BD).to(tl.float32)
    if steps is not None:
        x = x * tl.load(steps + index, mask=mask, other=0.0).to(tl.float32)[:, None]
    return x
