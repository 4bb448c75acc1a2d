"""How exactly things are computed: `full_precision` for float32 products, `rounded` for float64 sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ovq.ops.options import TIE


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: autocast or a reduced matmul precision would change the routing."""
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
    """Sums that were computed in float64, rounded to `dtype`, in which they are kept.

    Weighted sums can lie half-way between two float32 numbers. Backends that add in different orders differ
    in the last bit of float64, and would then keep different sums. So all of them round half-way cases away
    from zero.
    """
    return sums if dtype == sums.dtype else (sums * (1 + TIE)).to(dtype)
