"""`Linear`: the projections of all layers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.ops.backends.cpu import FEW_TOKENS, FasterLinear, can_run, few_products, has_faster_library


class Linear(nn.Linear):
    """`torch.nn.Linear` without bias, by the fastest product that there is on a CPU.

    Args:
        in_features: width of the input.
        out_features: width of the output.

    Example:
        >>> layer = Linear(3, 2)
        >>> x = torch.randn(1, 3)
        >>> torch.allclose(layer(x), x @ layer.weight.T)
        True
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        # Adapters and quantization may put a weight of another kind here.
        if type(self.weight) is nn.Parameter and can_run(x, self.weight):
            has_graph = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
            num = math.prod(x.shape[:-1])
            if not has_graph and num <= FEW_TOKENS:
                return few_products(x, self.weight)
            if num > FEW_TOKENS and has_faster_library():
                return FasterLinear.apply(x, self.weight)
        return F.linear(x, self.weight)
