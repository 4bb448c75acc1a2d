"""Weight matrices in the formats of decoding kernels, which read all weights for every token."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from ovq.ops.backends.cpu.kernels import DTYPES
from ovq.ops.backends.cpu.mirrors import MIRRORS, Mirror
from ovq.ops.backends.cpu.tokens import call_kernel

#: Formats of weights: dtypes, and quantized ones with scales, `INT8` and `UINT4` of the headers.
FORMATS = (*(str(dtype).removeprefix("torch.") for dtype in DTYPES), "int8", "int4")
# Quantized weights lie in tiles of so many rows and groups of so many columns, four columns of all rows after
# the other; `ABREAST` and `GROUP` of quantized.h. Matrices are padded to both.
_TILE, _GROUP = 16, 64
# Rows that are quantized at a time: all of an output matrix at once would take several times its bytes.
_ROWS = 1024
# The largest int8 number that has a negative, and the largest number of 4 bits.
_MOST = {"int8": 127, "int4": 15}
# Zero point of int8: kernels multiply unsigned numbers.
_ZERO = 128


class Matrix(NamedTuple):
    """A weight matrix on the CPU, in a format of the kernels.

    Attributes:
        weight: dense `[N, D]` in a dtype; or quantized, uint8 `[tiles, groups, quads, 16, 4]`. An int8 byte
            is its number plus 128. With 4 bits, a byte has a number of the first half of a group of columns
            in its low bits and one of the second half in its high bits.
        format: one of `FORMATS`.
        shape: N and D.
        factors: for int8, scales `[tiles, groups, 16]` float32; for 4 bits, scale and minimum of each half
            group, `[tiles, groups, 2, 2, 16]` float16, the first 2 being the halves; None for other formats.
        bias: `[N]` float32, or None.
    """

    weight: Tensor
    format: str
    shape: tuple[int, int]
    factors: Tensor | None = None
    bias: Tensor | None = None

    def dequantised(self) -> Tensor:
        """`[N, D]` float32: the weights that products use.

        Example:
            >>> packed(torch.tensor([[1.27, 0.012]]), None, "int8").dequantised()
            tensor([[1.2700, 0.0100]])
        """
        if self.factors is None:
            return self.weight.float()
        # Axes: rows, groups, halves of a group (4 bits), columns.
        numbers = self.weight.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
        if self.format == "int8":
            numbers = (numbers.float() - _ZERO)[:, :, None]
            scales, minima = self.factors.mT.flatten(0, 1)[:, :, None, None], self.factors.new_zeros(())
        else:
            numbers = torch.stack([numbers & 15, numbers >> 4], 2)
            factors = self.factors.float().permute(0, 4, 1, 2, 3).flatten(0, 1)
            scales, minima = factors[..., None].unbind(3)
        return (numbers * scales + minima).flatten(1)[: self.shape[0], : self.shape[1]]

    def rows(self, ids: Tensor) -> Tensor:
        """`[..., D]` float32: the rows `ids` `[...]` of an int8 matrix, each from 0 to N - 1.

        Example:
            >>> packed(torch.tensor([[1.27, 0.012], [2.54, 0.0]]), None, "int8").rows(torch.tensor([1]))
            tensor([[2.5400, 0.0000]])
        """
        assert self.format == "int8"
        assert self.factors is not None
        tiles, rows = ids // _TILE, ids % _TILE
        numbers = self.weight[tiles, :, :, rows].flatten(-2).float() - _ZERO
        return (numbers * self.factors[tiles, :, rows, None]).flatten(-2)[..., : self.shape[1]]

    def call(self, first: int = 0, *, is_rough: bool = False) -> Mirror:
        """The matrix as an argument of kernels; its tensors must be kept alive.

        Args:
            first: the first row, in formats without scales.
            is_rough: whether to multiply quantized weights with int8 in place of int16 inputs.
        """
        assert not first or self.factors is None
        # Formats with int8 inputs follow in the same order.
        call = MIRRORS["Matrix"](format=FORMATS.index(self.format) + is_rough * len(_MOST))
        for name in ("weight", "factors", "bias"):
            if (x := getattr(self, name)) is not None:
                setattr(call, name, x.data_ptr() + first * x.stride(0) * x.element_size())
        return call


@torch.no_grad()
def packed(weight: Tensor, bias: Tensor | None, format: str | None) -> Matrix:
    """A weight `[N, D]` and its bias `[N]` in a format; a copy only if that is not the weight's own.

    int8 has one scale per 64 neighbours in a row, whose largest magnitude becomes 127. int4 has a scale and a
    minimum per 32 neighbours, of two grids the closer one: 15 steps from the lowest to the highest, or from
    the largest magnitude to 7/8 of its opposite. In float32 blocks of GGUF stay as they are if they use their
    lowest number, and those of `Q4_1` the highest, too.

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
        # Padded with numbers that do not widen the range of their neighbours.
        rows = torch.cat([rows, rows[:, -1:].expand(-1, -dim % _GROUP)], 1)
        rows = torch.cat([rows, rows.new_zeros(-len(rows) % _TILE, rows.shape[1])])
        parts.append((_rounded_to_int8 if format == "int8" else _rounded_to_int4)(rows))
    numbers, factors = (torch.cat(x) for x in zip(*parts, strict=True))
    return Matrix(numbers, format, (num, dim), factors, own_bias)


def _rounded_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized rows `[16 tiles, 64 groups]` and their factors, as in `Matrix`."""
    groups = rows.unflatten(1, (-1, _GROUP))
    # Zeros may have any scale.
    factors = (groups.abs().amax(2) / _MOST["int8"]).clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (groups / factors[..., None]).round() + _ZERO
    return _tiled(numbers), factors.unflatten(0, (-1, _TILE)).mT.contiguous()


def _rounded_to_int4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[16 tiles, 64 groups]` quantized to 4 bits and their factors, as in `Matrix`."""
    halves = rows.unflatten(1, (-1, 2, _GROUP // 2))
    low, high = halves.aminmax(dim=3)
    most = torch.where(-low > high, low, high)
    # The grids of Q4_1 and of Q4_0, whose minimum is the number of greatest magnitude, with its sign.
    pairs = ((high - low) / _MOST["int4"], low), (most / -8, most)
    factors = torch.stack([torch.stack(pair, 3) for pair in pairs]).half()
    scales, minima = factors.float()[..., None].unbind(4)
    # Equal numbers may have any scale.
    numbers = ((halves - minima) / scales.masked_fill(scales == 0, 1)).round().clamp(0, _MOST["int4"])
    errors = (numbers * scales + minima - halves).square().sum(4, keepdim=True)
    factors, numbers = (x[0].where(errors[0] <= errors[1], x[1]) for x in (factors, numbers))
    tiles = factors.unflatten(0, (-1, _TILE)).permute(0, 2, 3, 4, 1)
    return _tiled(numbers[:, :, 0] + 16 * numbers[:, :, 1]), tiles.contiguous()


def _tiled(numbers: Tensor) -> Tensor:
    """Integers `[16 tiles, groups, columns]` from 0 to 255 as bytes `[tiles, groups, quads, 16, 4]`."""
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
