"""Parts shared by all mixers: query/key normalisation, rotary embedding, short convolution.

Models with different mixers thus differ only in their memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.layers.layout import SequenceLayout
from ovq.ops.backends.cpu.convolution import CompiledConvolution, convolution_step
from ovq.ops.backends.cpu.tokens import CompiledHeads, CompiledRMSNorm, CompiledSwiGLU, applied, can_run


def l2_normalize(x: Tensor) -> Tensor:
    """Scale vectors `[..., K]` to length 1, in float32 (float64 for float64); a zero vector stays zero.

    Example:
        >>> l2_normalize(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # The epsilon keeps the gradient of a zero vector finite; it is too small to change other vectors.
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context without autocast, which would round sums to bfloat16; the meta device has none to turn off."""
    return contextlib.nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class OwnWeights(nn.Module):
    """A module that initialises its own parameters by `reset_parameters`; a model does not touch them."""

    def reset_parameters(self) -> None:
        """Initialise the parameters of this module, without those of submodules."""
        raise NotImplementedError


class QKNorm(OwnWeights):
    """L2 normalisation of queries and keys, with a learned temperature `beta` per query head.

    Logits are `scale * q.k` with `scale = beta * sqrt(head_dim)` and `beta` initially 1
    (`docs/method/math.md`, section 1).
    """

    # The module's name, `qk_norm`, keeps `beta` out of weight decay in transformers' Trainer, like any other
    # norm: decay would make the softmax of every head flatter.

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

    def forward(
        self, channels: Tensor, num_kv_heads: int, tables: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split channels into heads and normalise queries and keys.

        Args:
            channels: `[B, T, (H + 2 Hkv) K]`: queries, keys and values, one head after the other.
            tables: result of `rotary_tables`, to apply rotary embedding to queries and keys; or None.

        Returns:
            `q [B,T,H,K]` and `k [B,T,Hkv,K]` in float32 (float64 for float64 channels), `v [B,T,Hkv,K]` in
            the dtype of the channels, and `scale`. The scale is returned here because offloaded weights exist
            only while their module runs.
        """
        if can_run(channels):
            q, k, v = applied(
                CompiledHeads, channels, *(tables or (None, None)), len(self.beta), num_kv_heads
            )
            return q, k, v, self.scale
        heads = channels.unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([len(self.beta), num_kv_heads, num_kv_heads], dim=2)
        q, k = l2_normalize(q), l2_normalize(k)
        if tables is not None:
            q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
        return q, k, v, self.scale


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * weight`, on a CPU in one pass over memory.

    Example:
        >>> RMSNorm(2, eps=0.0)(torch.tensor([3.0, 3.0])).tolist()
        [1.0, 1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        # Of an input of another width, PyTorch says what is wrong; the kernel would read beyond it.
        is_fit = self.eps is not None and x.shape[-1:] == self.weight.shape
        if is_fit and can_run(x, self.weight):
            return applied(CompiledRMSNorm, x, self.weight, self.eps)
        return super().forward(x)


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2 D]`, where `gate` is the first half and `up` the second.

    Example:
        >>> swiglu(torch.tensor([0.0, 1.0, 2.0, 3.0]))
        tensor([0.0000, 2.1932])
    """
    if can_run(x):
        return applied(CompiledSwiGLU, x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary_tables(positions: Tensor, dim: int, *, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, K/2]` of the rotary embedding.

    Angles are computed and reduced modulo 2 pi in float64; at position 10^6 a float32 angle is off by 0.06
    rad.

    Args:
        positions: `[T]` integers.
        dim: head size K, even.
        theta: base of the frequencies.
        like: a tensor with the dtype and device of the tables.
    """
    position = positions.to(like.device, torch.float64)
    frequency = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=like.device) / dim)
    angle = (position[:, None] * frequency).remainder(2 * torch.pi).to(like.dtype)
    return angle.cos(), angle.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs `(i, i + K/2)` of each head of `x` `[B, T, H, K]` by the angles of `rotary_tables`."""
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class ShortConvolution(OwnWeights):
    """Causal depthwise convolution over time: each channel mixes its last `conv_size` tokens.

    No activation follows. Queries and keys are normalised next, and a non-linearity such as SiLU would remove
    most of their negative values and thus confine them to part of the sphere.

    Args:
        num_channels: D.
        conv_size: kernel size C, at least 2.

    Raises:
        ValueError: a smaller kernel.

    Example:
        >>> conv = ShortConvolution(6, conv_size=3)
        >>> y, state = conv(torch.randn(2, 5, 6))
        >>> y.shape, state.shape
        (torch.Size([2, 5, 6]), torch.Size([2, 6, 2]))
    """

    def __init__(self, num_channels: int, conv_size: int):
        super().__init__()
        if conv_size < 2:
            raise ValueError(f"conv_size: expected at least 2, found {conv_size}")
        self.conv_size = conv_size
        # weight[:, i] multiplies the token `conv_size - 1 - i` steps back.
        self.weight = nn.Parameter(torch.empty(num_channels, conv_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight like `torch.nn.Conv1d`, uniform in +-1/sqrt(conv_size)."""
        bound = self.conv_size**-0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self, x: Tensor, state: Tensor | None = None, layout: SequenceLayout | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve, continuing from `state`.

        Args:
            x: `[B, T, D]`.
            state: `[B, D, conv_size - 1]`, the last inputs of earlier calls; None for zeros.
            layout: padding and packing of the call. Padding counts as zeros; packed rows are independent.

        Returns:
            `[B, T, D]`, zero at padding columns, and the new state: the last `conv_size - 1` real inputs of
            each row.

        Raises:
            ValueError: if tokens have other channels, or the state other rows, channels or inputs.
        """
        if x.dim() != 3 or x.shape[2] != len(self.weight):
            raise ValueError(f"expected x of shape [B, T, {len(self.weight)}], found {list(x.shape)}")
        # `len(x)` would fix the number of rows in an exported graph.
        expected = (x.shape[0], *self.weight.shape[:1], self.conv_size - 1)
        if state is not None and state.shape != expected:
            raise ValueError(
                f"expected a cache whose convolution has kept {list(expected)} (rows, channels, inputs), "
                f"found {list(state.shape)}"
            )
        new_mask = None if layout is None else layout.new_mask
        if new_mask is not None:
            x = x.masked_fill(~new_mask[..., None], 0)
        elif (
            state is not None
            and x.shape[1] == 1
            and not torch.is_grad_enabled()
            and can_run(x, state, self.weight)
        ):
            return convolution_step(x, state, self.weight)
        offset = None if layout is None or layout.cu_seqlens is None else layout.offset_in_row()
        past = None if state is None else state.transpose(1, 2).to(x.dtype)
        # Under autocast parameters may be float32, which would silently promote the activations.
        weight = self.weight.to(x.dtype)
        if can_run(x, weight, *(() if past is None else (past,))):
            y = applied(CompiledConvolution, x, past, weight, offset)
        else:
            y = _convolve(x, past, weight, offset)
        if new_mask is not None:
            y = y.masked_fill(~new_mask[..., None], 0)
        return y, self._last_inputs(x, past, new_mask)

    def _last_inputs(self, x: Tensor, past: Tensor | None, new_mask: Tensor | None) -> Tensor:
        """Last `conv_size - 1` real inputs of each row, `[B, D, conv_size - 1]`; `past` precedes `x`."""
        num_back = self.conv_size - 1
        if new_mask is None:
            # Copied, as a view would keep the whole sequence in memory for as long as the state.
            x = _with_past(x[:, -num_back:], past, num_back)
            return x[:, -num_back:].transpose(1, 2).contiguous()
        x = _with_past(x, past, num_back)
        # Index after the last real token; 0 for a row of padding only, which keeps its state.
        columns = torch.arange(1, new_mask.shape[1] + 1, device=x.device)
        end = (new_mask * columns).amax(1)
        index = end[:, None] + torch.arange(num_back, device=x.device)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2])).transpose(1, 2).contiguous()


def _with_past(x: Tensor, past: Tensor | None, num_back: int) -> Tensor:
    """`x` `[B, T, D]` preceded by the `num_back` tokens of `past`, or by zeros."""
    return F.pad(x, (0, 0, num_back, 0)) if past is None else torch.cat([past, x], dim=1)


def _convolve(x: Tensor, past: Tensor | None, weight: Tensor, offset: Tensor | None) -> Tensor:
    """Causal depthwise convolution of `x` `[B, T, D]` in PyTorch operations.

    Args:
        past: `[B, C - 1, D]`, the preceding tokens; None for zeros. weight: `[D, C]`.
        offset: `[T]` number of tokens before each token in its packed row; None without packing.
    """
    num_tokens, num_back = x.shape[1], weight.shape[1] - 1
    x = _with_past(x, past, num_back)
    taps = weight.unbind(1)
    y = x[:, num_back:] * taps[-1]
    for back in range(1, num_back + 1):
        earlier = x[:, num_back - back : num_back - back + num_tokens]
        if offset is not None:
            earlier = earlier * (offset >= back).to(x.dtype)[:, None]
        y = torch.addcmul(y, earlier, taps[-1 - back])
    return y


def check_kwargs(kwargs: Mapping[str, Any], allowed: frozenset[str], *, output_attentions: bool) -> None:
    """Raise ValueError for unknown keyword arguments of `forward`, or if attention matrices are asked for."""
    if unknown := sorted(set(kwargs) - allowed):
        raise ValueError(f"expected keyword arguments among {sorted(allowed)}, found {unknown}")
    if output_attentions:
        raise ValueError(
            "expected output_attentions=False, found True: mixers do not form attention matrices"
        )
