"""Linear layers whose weights are whole numbers of 8 or 4 bits, in place of those of a model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.layers.products import is_plain
from ovq.ops.backends.cpu import Matrix, is_available, matrix_product, packed

#: The formats of such weights.
PACKED = ("int8", "int4")


class PackedLinear(nn.Module):
    """`nn.Linear` with weights of 8 or 4 bits, for a CPU. Gradients reach the inputs alone.

    Args:
        linear: the layer whose weights are rounded. format: `"int8"` or `"int4"`.

    Shapes:
        `[..., D]` to `[..., N]`, in the dtype of the input.

    Example:
        >>> linear = nn.Linear(64, 32)
        >>> x = torch.randn(5, 64)
        >>> bool((PackedLinear(linear, "int8")(x) - linear(x)).abs().max() < 0.02)
        True
    """

    def __init__(self, linear: nn.Linear, format: str) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.format = format
        matrix = packed(linear.weight, linear.bias, format)
        # As bytes, which `to(dtype)` leaves as they are.
        for name, x in (("numbers", matrix.weight), ("factors", matrix.factors), ("bias", matrix.bias)):
            self.register_buffer(name, None if x is None else x.view(torch.uint8))
        self._dtype = None if matrix.factors is None else matrix.factors.dtype

    numbers: Tensor
    factors: Tensor
    bias: Tensor | None

    @property
    def matrix(self) -> Matrix:
        """The weights and the bias, as kernels take them."""
        bias = None if self.bias is None else self.bias.view(torch.float32)
        assert self._dtype is not None
        shape = self.out_features, self.in_features
        return Matrix(self.numbers, self.format, shape, self.factors.view(self._dtype), bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., N]`."""
        matrix = self.matrix
        if x.is_cpu and x.numel() and is_available() and not (torch.is_grad_enabled() and x.requires_grad):
            return matrix_product(x.float(), matrix).to(x.dtype)
        bias = None if matrix.bias is None else matrix.bias.to(x.dtype)
        return F.linear(x, matrix.dequantised().to(x.dtype), bias)

    def extra_repr(self) -> str:
        """What `repr` says."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )


def pack_(model: Any, format: str) -> None:
    """Put `PackedLinear`s in place of a model's linear layers. Those that hooks look into stay.

    The output layer has 8 bits where the others have 4, as in GGUF files.
    """
    output = model.get_output_embeddings()
    for owner in list(model.modules()):
        for name, module in owner.named_children():
            if is_plain(module, nn.Linear) and type(module.weight) is nn.Parameter:
                own = PackedLinear(module, "int8" if module is output else format)
                setattr(owner, name, own.train(module.training))


def can_pack(model: Any) -> bool:
    """Whether kernels are there to multiply packed weights, and a model's weights where they reach them."""
    return is_available() and all(x.is_cpu for x in model.parameters())
