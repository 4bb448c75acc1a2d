"""Weights in the formats that kernels read when decoding, which has to read all of them for every token."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ovq.ops.backends.cpu.kernels import DTYPES
from ovq.ops.backends.cpu.mirrors import mirror_of
from ovq.ops.backends.cpu.tokens import call_kernel

#: Formats of weights: those of numbers, and whole numbers with factors, `INT8` and `UINT4` of matrix.h.
FORMATS = (*(str(dtype).removeprefix("torch.") for dtype in DTYPES), "int8", "int4")
# Rows of whole numbers are filled up to a multiple of this, `GROUP` of matrix.h.
_GROUP = 64
# Rows that are rounded at a time: all of an output matrix at once would take several times its bytes.
_ROWS = 1024
# The largest int8 number that has a negative, and the largest of 4 bits.
_MOST = {"int8": 127, "int4": 15}


class Matrix(NamedTuple):
    """A dense weight matrix on the CPU as kernels read it.

    Attributes:
        weight: `[N, D]` numbers. For whole numbers, D is filled up to G groups of 64: int8 `[N, 64 G]`, or
            uint8 `[N, 32 G]`, whose low 4 bits are the first half of a group and whose high ones the second.
        format: one of `FORMATS`.
        dim: D.
        factors: of int8 `[N, G]` float32, by which groups are multiplied; of 4 bits `[N, 2, 2 G]` float16, by
            which half groups are multiplied and what is added then; None for other formats.
        bias: `[N]` float32, or None.
    """

    weight: Tensor
    format: str
    dim: int
    factors: Tensor | None = None
    bias: Tensor | None = None

    def dequantised(self) -> Tensor:
        """`[N, D]` float32: the weights that products are made with.

        Example:
            >>> packed(torch.tensor([[1.27, 0.012]]), None, "int8").dequantised()
            tensor([[1.2700, 0.0100]])
        """
        if self.factors is None:
            return self.weight.float()
        if self.format == "int8":
            numbers, steps, lows = self.weight, self.factors, torch.zeros(())
        else:
            numbers = self.weight.view(len(self.weight), -1, _GROUP // 2)
            numbers = torch.cat([numbers & 15, numbers >> 4], 2)
            steps, lows = self.factors.float().unbind(1)
        numbers = numbers.view(*steps.shape, -1)
        return (numbers * steps[..., None] + lows[..., None]).flatten(1)[:, : self.dim]

    def call(self, first: int = 0) -> _Matrix:
        """The matrix from row `first` on as kernels take it; its tensors must be kept alive."""
        call = _Matrix(format=FORMATS.index(self.format))
        for name in ("weight", "factors", "bias"):
            if (x := getattr(self, name)) is not None:
                setattr(call, name, x.data_ptr() + first * x.stride(0) * x.element_size())
        return call


@mirror_of("Matrix")
class _Matrix(ctypes.Structure):
    """`Matrix` of matrix.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "factors", "bias")),
        ("format", ctypes.c_int64),
    ]


@torch.no_grad()
def packed(weight: Tensor, bias: Tensor | None, format: str | None) -> Matrix:
    """A weight `[N, D]` and its bias `[N]` in a format; a copy only where that is another than the weight's.

    In int8, 64 neighbours in a row are rounded to steps of equal length, of which the largest number has 127.
    In int4, 32 neighbours are rounded to 15 steps between the lowest and the highest of them. Blocks `Q4_1`
    of GGUF are such numbers, and stay as they are.

    Args:
        weight: dense. bias: its bias, or None.
        format: one of `FORMATS`; None for that of the weight.

    Example:
        >>> packed(torch.tensor([[0.0, 0.52, 3.75]]), None, "int4").dequantised()
        tensor([[0.0000, 0.5000, 3.7500]])
    """
    own_bias = None if bias is None else bias.detach().float().contiguous()
    weight, (num, dim) = weight.detach(), weight.shape
    if format not in _MOST:
        numbers = weight if format is None else weight.to(DTYPES[FORMATS.index(format)])
        return Matrix(numbers, FORMATS[DTYPES.index(numbers.dtype)], dim, None, own_bias)
    parts = []
    for first in range(0, num, _ROWS):
        rows = weight[first : first + _ROWS].float()
        # Filled up with numbers that do not widen the range of their neighbours.
        filled = torch.cat([rows, rows[:, -1:].expand(-1, -dim % _GROUP)], 1)
        parts.append((_rounded_to_int8 if format == "int8" else _rounded_to_int4)(filled))
    numbers = torch.cat([part for part, _ in parts])
    # Kernels read them by whole vectors, beyond the last.
    factors = torch.cat([*(part.flatten() for _, part in parts), parts[0][1].new_zeros(_GROUP)])[:-_GROUP]
    return Matrix(numbers, format, dim, factors.view(num, *parts[0][1].shape[1:]), own_bias)


def _rounded_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[N, 64 G]` as whole numbers, and their factors `[N, G]`."""
    groups = rows.unflatten(1, (-1, _GROUP))
    # Zeros have any factor.
    factors = (groups.abs().amax(2) / _MOST["int8"]).clamp(min=torch.finfo(torch.float32).tiny)
    return (groups / factors[..., None]).round().to(torch.int8).flatten(1), factors


def _rounded_to_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[N, 64 G]` as bytes `[N, 32 G]`, and their steps and lowest weights `[N, 2, 2 G]`."""
    groups = rows.unflatten(1, (-1, _GROUP // 2))
    low, high = groups.aminmax(dim=2)
    factors = torch.stack([(high - low) / _MOST["int4"], low], 1).half()
    steps, low = factors.float()[..., None].unbind(1)
    # Equal ones have any step.
    numbers = (groups - low) / steps.masked_fill(steps == 0, 1)
    numbers = numbers.round().clamp(0, _MOST["int4"]).to(torch.uint8).view(len(rows), -1, 2, _GROUP // 2)
    return (numbers[:, :, 0] | numbers[:, :, 1] << 4).flatten(1), factors


def output_step(x: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
    """`weight norm(x)` `[B, 1, N]` of tokens x `[B, 1, D]` float32; norm `[D]` is that of an RMS norm."""
    x = x.contiguous()
    num_out, dim = len(weight.weight), weight.dim
    num, call = x.numel() // dim, weight.call()
    scratch, y = torch.empty_like(x), x.new_empty(*x.shape[:-1], num_out)
    call_kernel(
        *("ovq_output_step", torch.get_num_threads(), num, dim, num_out, float(eps)),
        *(x, norm, ctypes.addressof(call), scratch, y),
    )
    return y
