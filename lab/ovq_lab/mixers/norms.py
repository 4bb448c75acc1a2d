"""Norms that are computed in float32 or float64."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WideLayerNorm(nn.LayerNorm):
    """Layer norm in float32 (float64 for float64 inputs), whatever the dtypes of its input and its weights.

    Example:
        >>> WideLayerNorm(4).bfloat16()(torch.ones(2, 4, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps)


class WideRMSNorm(nn.RMSNorm):
    """RMS norm in float32 (float64 for float64 inputs), whatever the dtypes of its input and its weights.

    Example:
        >>> WideRMSNorm(4).bfloat16()(torch.ones(2, 4, dtype=torch.bfloat16)).dtype
        torch.float32
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
