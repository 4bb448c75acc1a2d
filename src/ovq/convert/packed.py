"""Linear layers with int8 or int4 weights, which replace those of a model."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.convert.cache_step import MOST_ROWS
from ovq.layers.products import is_plain
from ovq.ops.backends.cpu.kernels import is_available
from ovq.ops.backends.cpu.weights import Matrix, matrix_product, packed
from ovq.ops.transforms import needs_operations

#: Formats of quantized weights.
PACKED = ("int8", "int4")


class PackedLinear(nn.Module):
    """`nn.Linear` with weights of 8 or 4 bits, for a CPU. Only the inputs get gradients.

    Inputs are quantized too: to 16 bits for up to 32 tokens and in an output layer, else to 8 bits.

    Args:
        format: `"int8"` or `"int4"`. An output layer is always int8; GGUF files also give it more bits.
        is_output: whether it is the model's output layer.
    """

    def __init__(self, linear: nn.Linear, format: str, *, is_output: bool = False) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.format, self.is_output = "int8" if is_output else format, is_output
        matrix = packed(linear.weight, linear.bias, self.format)
        # As uint8, which `to(dtype)` leaves unchanged.
        for name, x in (("numbers", matrix.weight), ("factors", matrix.factors), ("bias", matrix.bias)):
            self.register_buffer(name, None if x is None else x.view(torch.uint8))

    numbers: Tensor
    factors: Tensor
    bias: Tensor | None

    @property
    def matrix(self) -> Matrix:
        """Weights and bias in the form that kernels take."""
        bias = None if self.bias is None else self.bias.view(torch.float32)
        factors = self.factors.view(torch.float32 if self.format == "int8" else torch.float16)
        return Matrix(self.numbers, self.format, (self.out_features, self.in_features), factors, bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., N]`, in the dtype of the input."""
        matrix = self.matrix
        has_graph = torch.is_grad_enabled() and x.requires_grad
        if x.is_cpu and x.numel() and is_available() and not (has_graph or needs_operations()):
            is_rough = x.numel() > MOST_ROWS * self.in_features and not self.is_output
            return matrix_product(x.float(), matrix, is_rough=is_rough).to(x.dtype)
        bias = None if matrix.bias is None else matrix.bias.to(x.dtype)
        return F.linear(x, matrix.dequantised().to(x.dtype), bias)

    def extra_repr(self) -> str:
        """Sizes and format for `repr`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}"
        )


class PackedEmbedding(nn.Module):
    """`nn.Embedding` that shares the weights of a packed output layer, as the model's own did."""

    def __init__(self, embedding: nn.Embedding, output: PackedLinear) -> None:
        super().__init__()
        self.num_embeddings, self.output = embedding.num_embeddings, output
        # The dtype of the results, and as many rows as there are tokens, to check ids.
        self.register_buffer("rows", embedding.weight.new_empty(self.num_embeddings, 0))

    rows: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        """`[...]` to `[..., D]`; RuntimeError for ids that are out of range."""
        F.embedding(ids, self.rows)
        return self.output.matrix.rows(ids).to(self.rows.dtype)


def pack_(model: Any, format: str) -> None:
    """Replace a model's linear layers by `PackedLinear`, except those with hooks, and a tied embedding."""
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = is_plain(inputs, nn.Embedding) and inputs.weight is getattr(output, "weight", None)
    for owner in list(model.modules()):
        for name, module in owner.named_children():
            if is_plain(module, nn.Linear) and type(module.weight) is nn.Parameter:
                own = PackedLinear(module, format, is_output=module is output)
                setattr(owner, name, own.train(module.training))
    if is_tied and type(output := model.get_output_embeddings()) is PackedLinear:
        model.set_input_embeddings(PackedEmbedding(inputs, output).train(model.training))
        # `tie_weights` would look for the weight that both had.
        model.config.tie_word_embeddings = False
    for x in model.parameters():
        # Otherwise the few parameters left would keep the whole weight file mapped.
        x.data = x.data.clone()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        # glibc does not return the memory of the old weights by itself, as packed ones lie in between.
        trim(0)


def can_pack(model: Any) -> bool:
    """Whether compiled kernels are available and all weights of the model are on the CPU."""
    return is_available() and all(x.is_cpu for x in model.parameters())
