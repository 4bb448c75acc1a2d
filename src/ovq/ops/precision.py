"""Numerical precision: `full_precision` for float32 matrix products, `rounded` for float64 sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ovq.ops.options import TIE


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and reduced matmul precision (such as TF32), which would change the routing."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def rounded(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 sums rounded to `dtype`, the dtype of the state, with half-way cases away from zero.

    Weighted sums can lie half-way between two float32 numbers. Backends that add in different orders differ
    in the last bit of float64 and would then round such sums differently.
    """
    return sums if dtype == sums.dtype else (sums * (1 + TIE)).to(dtype)
