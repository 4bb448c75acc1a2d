"""Weights in the formats that kernels read when decoding, which has to read all of them for every token."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ovq.ops.backends.cpu.kernels import DTYPES
from ovq.ops.backends.cpu.mirrors import Mirror, fields_of
from ovq.ops.backends.cpu.tokens import call_kernel

#: Formats of weights: those of numbers, and whole numbers with factors, `INT8` and `UINT4` of matrix.h.
FORMATS = (*(str(dtype).removeprefix("torch.") for dtype in DTYPES), "int8", "int4")
# Whole numbers lie in tiles of so many rows and groups of so many columns, four columns of all rows after the
# other; `ABREAST` and `GROUP` of whole.h. Matrices are filled up to them.
_TILE, _GROUP = 16, 64
# Rows that are rounded at a time: all of an output matrix at once would take several times its bytes.
_ROWS = 1024
# The largest int8 number that has a negative, and the largest of 4 bits.
_MOST = {"int8": 127, "int4": 15}
# The byte that stands for 0 in int8: kernels multiply numbers without a sign.
_ZERO = 128


class Matrix(NamedTuple):
    """A weight matrix on the CPU as kernels read it.

    Attributes:
        weight: dense `[N, D]` numbers; or whole numbers, uint8 `[tiles, groups, quads, 16, 4]`: in int8 a
            byte is 128 more than its number, and in 4 bits it has one of the first half of a group of columns
            in its low bits and one of the second in its high ones.
        format: one of `FORMATS`.
        shape: N and D.
        factors: of int8 `[tiles, groups, 16]` float32, by which numbers are multiplied; of 4 bits
            `[tiles, groups, 2, 2, 16]` float16, by which those of half a group are multiplied and what is
            added then; None for other formats.
        bias: `[N]` float32, or None.
    """

    weight: Tensor
    format: str
    shape: tuple[int, int]
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
        # Rows, then groups, the halves of 4 bits, and columns.
        numbers = self.weight.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
        if self.format == "int8":
            numbers = (numbers.float() - _ZERO)[:, :, None]
            steps, lows = self.factors.mT.flatten(0, 1)[:, :, None, None], self.factors.new_zeros(())
        else:
            numbers = torch.stack([numbers & 15, numbers >> 4], 2)
            factors = self.factors.float().permute(0, 4, 1, 2, 3).flatten(0, 1)
            steps, lows = factors[..., None].unbind(3)
        return (numbers * steps + lows).flatten(1)[: self.shape[0], : self.shape[1]]

    def call(self, first: int = 0, *, is_rough: bool = False) -> _Matrix:
        """The matrix as kernels take it; its tensors must be kept alive.

        Args:
            first: the row to begin at, of numbers.
            is_rough: whether to multiply whole numbers with inputs of 8 bits in place of 16.
        """
        assert not first or self.factors is None
        # The same formats once more.
        call = _Matrix(format=FORMATS.index(self.format) + is_rough * len(_MOST))
        for name in ("weight", "factors", "bias"):
            if (x := getattr(self, name)) is not None:
                setattr(call, name, x.data_ptr() + first * x.stride(0) * x.element_size())
        return call


class _Matrix(Mirror, of="Matrix"):
    """`Matrix` of matrix.h."""

    _fields_ = fields_of("Matrix")


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
        return Matrix(numbers, FORMATS[DTYPES.index(numbers.dtype)], (num, dim), None, own_bias)
    parts = []
    for first in range(0, num, _ROWS):
        rows = weight[first : first + _ROWS].float()
        # Filled up with numbers that do not widen the range of their neighbours.
        rows = torch.cat([rows, rows[:, -1:].expand(-1, -dim % _GROUP)], 1)
        rows = torch.cat([rows, rows.new_zeros(-len(rows) % _TILE, rows.shape[1])])
        parts.append((_rounded_to_int8 if format == "int8" else _rounded_to_int4)(rows))
    numbers, factors = (torch.cat(x) for x in zip(*parts, strict=True))
    return Matrix(numbers, format, (num, dim), factors, own_bias)


def _rounded_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[16 tiles, 64 groups]` as whole numbers and their factors, as in `Matrix`."""
    groups = rows.unflatten(1, (-1, _GROUP))
    # Zeros have any factor.
    factors = (groups.abs().amax(2) / _MOST["int8"]).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (groups / factors[..., None]).round() + _ZERO
    return _tiled(numbers), factors.unflatten(0, (-1, _TILE)).mT.contiguous()


def _rounded_to_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[16 tiles, 64 groups]` as numbers of 4 bits and their factors, as in `Matrix`."""
    halves = rows.unflatten(1, (-1, 2, _GROUP // 2))
    low, high = halves.aminmax(dim=3)
    factors = torch.stack([(high - low) / _MOST["int4"], low], 3).half()
    steps, low = factors.float()[..., None].unbind(3)
    # Equal ones have any step.
    numbers = ((halves - low) / steps.masked_fill(steps == 0, 1)).round().clamp(0, _MOST["int4"])
    tiles = factors.unflatten(0, (-1, _TILE)).permute(0, 2, 3, 4, 1)
    return _tiled(numbers[:, :, 0] + 16 * numbers[:, :, 1]), tiles.contiguous()


def _tiled(numbers: Tensor) -> Tensor:
    """Whole numbers `[16 tiles, groups, columns]` from 0 to 255 as bytes `[tiles, groups, quads, 16, 4]`."""
    tiles = numbers.to(torch.uint8).unflatten(0, (-1, _TILE)).unflatten(3, (-1, 4))
    return tiles.permute(0, 2, 3, 1, 4).contiguous()


def matrix_product(
    x: Tensor, weight: Matrix, norm: Tensor | None = None, eps: float = 0.0, *, is_rough: bool = False
) -> Tensor:
    """`weight norm(x) + bias` `[..., N]` of tokens x `[..., D]` float32.

    Args:
        x: the tokens.
        weight: the matrix, with its bias.
        norm: `[D]` of an RMS norm, or None.
        eps: of the norm.
        is_rough: see `Matrix.call`.
    """
    x = x.contiguous()
    num_out, dim = weight.shape
    num, call = x.numel() // dim, weight.call(is_rough=is_rough)
    scratch, y = torch.empty_like(x), x.new_empty(*x.shape[:-1], num_out)
    call_kernel(
        *("ovq_matrix_product", torch.get_num_threads(), num, dim, num_out, float(eps)),
        *(x, 0 if norm is None else norm, ctypes.addressof(call), scratch, y),
    )
    return y
