"""Weights in the formats that kernels read when decoding, which has to read all of them for every token."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.ops.backends.cpu.kernels import DTYPES
from ovq.ops.backends.cpu.mirrors import mirror_of
from ovq.ops.backends.cpu.tokens import call_kernel

#: Formats of weights: those of numbers, and int8 with factors, `INT8` of step.h.
FORMATS = (*DTYPES, torch.int8)
# Neighbours in a row that have one factor, `GROUP` of step.h.
_GROUP = 64
# Rows that are rounded at a time: all of an output matrix at once would take several times its bytes.
_ROWS = 1024
# The largest int8 number that has a negative.
_MOST = 127


class Matrix(NamedTuple):
    """A dense weight matrix on the CPU as kernels read it.

    Attributes:
        weight: `[N, D]` in one of `FORMATS`.
        factors: `[N, D / 64]` float32, rounded up, by which neighbours in int8 are multiplied; None for other
            formats.
        bias: `[N]` float32, or None.
    """

    weight: Tensor
    factors: Tensor | None = None
    bias: Tensor | None = None

    def dequantised(self) -> Tensor:
        """`[N, D]` float32: the weights that products are made with.

        Example:
            >>> packed(torch.tensor([[1.27, 0.012]]), None, torch.int8).dequantised()
            tensor([[1.2700, 0.0100]])
        """
        weight = self.weight.float()
        if self.factors is None:
            return weight
        return weight * self.factors.repeat_interleave(_GROUP, 1)[:, : weight.shape[1]]

    def call(self, first: int = 0) -> _Matrix:
        """The matrix from row `first` on as kernels take it; its tensors must be kept alive."""
        size = self.weight.element_size() * self.weight.shape[1]
        call = _Matrix(weight=self.weight.data_ptr() + first * size, format=FORMATS.index(self.weight.dtype))
        for name in ("factors", "bias"):
            if (x := getattr(self, name)) is not None:
                setattr(call, name, x.data_ptr() + first * x.stride(0) * x.element_size())
        return call


@mirror_of("Matrix")
class _Matrix(ctypes.Structure):
    """`Matrix` of step.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "factors", "bias")),
        ("format", ctypes.c_int64),
    ]


@torch.no_grad()
def packed(weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Matrix:
    """A weight `[N, D]` and its bias `[N]` in a format; a copy only where that is another than the weight's.

    In int8, 64 neighbours in a row are rounded to steps of equal length, of which the largest number has 127.

    Args:
        weight: dense. bias: its bias, or None.
        dtype: one of `FORMATS`; None for that of the weight.
    """
    own_bias = None if bias is None else bias.detach().float().contiguous()
    weight = weight.detach()
    if dtype is not torch.int8:
        return Matrix(weight.to(weight.dtype if dtype is None else dtype), None, own_bias)
    num, dim = weight.shape
    rounded, factors = weight.new_empty(num, dim, dtype=dtype), []
    for first in range(0, num, _ROWS):
        rows = weight[first : first + _ROWS]
        wide = F.pad(rows.float(), (0, -dim % _GROUP)).view(len(rows), -1, _GROUP)
        # Zeros have any factor.
        factors.append((wide.abs().amax(2) / _MOST).clamp(min=torch.finfo(torch.float32).tiny))
        steps = (wide / factors[-1][..., None]).round().to(dtype)
        rounded[first : first + _ROWS] = steps.view(len(rows), -1)[:, :dim]
    return Matrix(rounded, torch.cat(factors), own_bias)


def output_step(x: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
    """`weight norm(x)` `[B, 1, N]` of tokens x `[B, 1, D]` float32; norm `[D]` is that of an RMS norm."""
    x = x.contiguous()
    num_out, dim = weight.weight.shape
    num, call = x.numel() // dim, weight.call()
    scratch, y = torch.empty_like(x), x.new_empty(*x.shape[:-1], num_out)
    call_kernel(
        *("ovq_output_step", torch.get_num_threads(), num, dim, num_out, float(eps)),
        *(x, norm, ctypes.addressof(call), scratch, y),
    )
    return y
