"""Numerical precision: `full_precision` for float32 matrix products, `rounded` for float64 sums."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ovq.ops.options import TIE

# Whose precision newer programs set; older ones call `torch.set_float32_matmul_precision`.
_PRODUCTS = (
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]  # torch declares the others of this module
)


# Settings are those of all threads: how many calls inside need others than they found, and what they found.
_lock = threading.Lock()
_num_inside = 0
_settings: tuple[str, list[str]] = "highest", []


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and reduced matmul precision (such as TF32), which would change the routing."""
    has_changed = _enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if has_changed:
            _leave()


def _enter() -> bool:
    """Make products exact unless they are; returns whether `_leave` has to follow."""
    global _num_inside, _settings
    with _lock:
        if not _num_inside:
            # Where newer settings are lower than the older one, it cannot be read.
            with contextlib.suppress(RuntimeError):
                if torch.get_float32_matmul_precision() == "highest":
                    return False
            newer = [products.fp32_precision for products in _PRODUCTS]
            for products in _PRODUCTS:
                products.fp32_precision = "ieee"
            # Can be read only now that nothing contradicts it; it must not contradict either.
            _settings = torch.get_float32_matmul_precision(), newer
            torch.set_float32_matmul_precision("highest")
        _num_inside += 1
    return True


def _leave() -> None:
    """Restore the settings if no other call needs products to be exact."""
    global _num_inside
    with _lock:
        _num_inside -= 1
        if _num_inside:
            return
        older, newer = _settings
        torch.set_float32_matmul_precision(older)
        for products, precision in zip(_PRODUCTS, newer, strict=True):
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
