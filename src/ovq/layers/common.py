"""Parts that every mixer shares: query/key normalisation, rotary embedding, short convolution.

They are the same for all mixers so that two models differ in their memory alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.layers.layout import SequenceLayout


def l2_normalize(x: Tensor) -> Tensor:
    """Scale the last dimension to length 1, in float32 (float64 for float64 inputs).

    Args:
        x: `[..., K]`.

    Returns:
        `[..., K]` in float32 or float64. A zero vector stays zero.

    Example:
        >>> l2_normalize(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # The epsilon only keeps the gradient of a zero vector finite; it is far below the resolution of a real
    # one.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)


class QKNorm(nn.Module):
    """L2 normalisation of queries and keys, with a learned temperature `beta` per query head.

    Logits are `scale * q.k` with `scale = beta * sqrt(head_dim)` and `beta` initially 1 (spec section 2).

    Args:
        num_heads: query heads H.
        head_dim: K.

    Example:
        >>> norm = QKNorm(num_heads=2, head_dim=16)
        >>> norm.scale.tolist()
        [4.0, 4.0]
    """

    # The module's name, `qk_norm`, keeps `beta` out of weight decay in transformers' Trainer, as for any
    # other norm: decay would pull every head towards a flat softmax.

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.head_dim = head_dim
        self.beta = nn.Parameter(torch.ones(num_heads))

    def reset_parameters(self) -> None:
        """Set `beta` to 1."""
        nn.init.ones_(self.beta)

    @property
    def scale(self) -> Tensor:
        """Factor on the logits, `[H]`, differentiable."""
        return self.beta * self.head_dim**0.5

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise `q [B,T,H,K]` and `k [B,T,Hkv,K]`; both come back in float32 (float64 for float64)."""
        return l2_normalize(q), l2_normalize(k)


def rotary_tables(start: int, length: int, dim: int, *, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding for positions `start .. start + length - 1`.

    Angles are formed and reduced modulo a turn in float64: at position 10^6 a float32 angle is off by 0.06
    rad.

    Args:
        start: first position.
        length: number of positions T.
        dim: head size K, even.
        theta: base of the frequencies.
        like: a tensor of the dtype and on the device that the tables shall have.

    Returns:
        Two `[T, K/2]` tables.

    Example:
        >>> cos, sin = rotary_tables(0, 2, 2, theta=10000.0, like=torch.empty(0))
        >>> cos[:, 0], sin[:, 0]
        (tensor([1.0000, 0.5403]), tensor([0.0000, 0.8415]))
    """
    position = torch.arange(start, start + length, dtype=torch.float64, device=like.device)
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=like.device) / dim)
    angle = (position[:, None] * frequency).remainder(2 * torch.pi).to(like.dtype)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs `(i, i + K/2)` of each head.

    Args:
        x: `[B, T, H, K]`.
        cos: `[T, K/2]`, from `rotary_tables`.
        sin: `[T, K/2]`.

    Example:
        >>> x = torch.randn(1, 4, 2, 8)
        >>> y = apply_rotary(x, *rotary_tables(0, 4, 8, theta=10000.0, like=x))
        >>> torch.allclose(x.norm(dim=-1), y.norm(dim=-1)), torch.equal(x[:, 0], y[:, 0])
        (True, True)
    """
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time: each channel mixes its last `conv_size` tokens.

    There is no activation after it: queries and keys are normalised next, and a non-linearity would keep them
    in one half of the sphere and cost them their signs.

    Args:
        num_channels: D.
        conv_size: taps C; at least 2.

    Example:
        >>> conv = ShortConvolution(6, conv_size=3)
        >>> y, state = conv(torch.randn(2, 5, 6))
        >>> y.shape, state.shape
        (torch.Size([2, 5, 6]), torch.Size([2, 6, 2]))
    """

    def __init__(self, num_channels: int, conv_size: int):
        super().__init__()
        self.conv_size = conv_size
        # weight[:, i] multiplies the token `conv_size - 1 - i` steps back.
        self.weight = nn.Parameter(torch.empty(num_channels, conv_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the taps as `torch.nn.Conv1d` does, uniform in +-1/sqrt(conv_size)."""
        bound = self.conv_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self, x: Tensor, state: Tensor | None = None, layout: SequenceLayout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve, continuing from `state`.

        Args:
            x: `[B, T, D]`.
            state: `[B, D, conv_size - 1]`, the last inputs of earlier calls; None for zeros.
            layout: padding and packing of the call. Padding counts as zeros; packed rows do not see each
                other.

        Returns:
            `[B, T, D]`, zero at padding columns, and the new state: the last `conv_size - 1` real inputs of
            each row.
        """
        num_tokens, num_back = x.shape[1], self.conv_size - 1
        new_mask = None if layout is None else layout.new_mask
        if new_mask is not None:
            x = x.masked_fill(~new_mask[..., None], 0)
        if state is None:
            x = F.pad(x, (0, 0, num_back, 0))
        else:
            x = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)

        offset = None if layout is None or layout.cu_seqlens is None else layout.offset_in_row()
        # Parameters may be float32 under autocast; the product would then silently widen the activations.
        taps = self.weight.to(x.dtype).unbind(1)
        y = x[:, num_back:] * taps[-1]
        for back in range(1, self.conv_size):
            earlier = x[:, num_back - back : num_back - back + num_tokens]
            if offset is not None:
                earlier = earlier * (offset >= back).to(x.dtype)[:, None]
            y = torch.addcmul(y, earlier, taps[-1 - back])
        if new_mask is not None:
            y = y.masked_fill(~new_mask[..., None], 0)
        return y, self._last_inputs(x, new_mask)

    def _last_inputs(self, x: Tensor, new_mask: Tensor | None) -> Tensor:
        """Last `conv_size - 1` real inputs of each row, `[B, D, conv_size - 1]`; `x` has as many in front."""
        num_back = self.conv_size - 1
        if new_mask is None:
            # A copy: a view would keep the whole sequence alive for as long as the state.
            return x[:, x.shape[1] - num_back :].transpose(1, 2).contiguous()
        # Column after the last real token; 0 for a row of padding alone, which keeps the state it came with.
        columns = torch.arange(1, new_mask.shape[1] + 1, device=x.device)
        end = (new_mask * columns).amax(1)
        index = end[:, None] + torch.arange(num_back, device=x.device)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2])).transpose(1, 2).contiguous()
