"""Numerical precision: `full_precision` for float32 matrix products, `rounded` for float64 sums."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ovq.ops.options import TIE

# Whose precision newer programs set; older ones call `torch.set_float32_matmul_precision`.
_PRODUCTS = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # torch declares the others of this module
)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and reduced matmul precision (such as TF32), which would change the routing."""
    try:
        is_full = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # The newer settings are lower than the older one.
        is_full = False
    exact = contextlib.nullcontext() if is_full else _exact_products()
    with exact, torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    before = [products.fp32_precision for products in _PRODUCTS]
    for products in _PRODUCTS:
        products.fp32_precision = "ieee"
    # Can be read only now that nothing contradicts it; it must not contradict either.
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for products, precision in zip(_PRODUCTS, before, strict=True):
            # "none" follows PyTorch's setting for everything, which may change later.
            for value in ("none", precision):
                if products.fp32_precision != precision:
                    products.fp32_precision = value


def rounded(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 sums rounded to `dtype`, the dtype of the state, with half-way cases away from zero.

    Weighted sums can lie half-way between two float32 numbers. Backends that add in different orders differ
    in the last bit of float64 and would then round such sums differently.
    """
    return sums if dtype == sums.dtype else (sums * (1 + TIE)).to(dtype)
