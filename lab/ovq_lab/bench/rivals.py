"""Other mixers in `ovq bench`: on a CPU PyTorch's exact attention and a sliding window, with `--device cuda`
others, each pinned to one implementation and named after it.

These are PyTorch's exact attention with each of its backends, FlexAttention over a sliding window, and, if
flash-linear-attention is installed, Gated DeltaNet and Mamba2 (whose state-space recurrence is linear
attention with one decay per head, fla's `simple_gla`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from ovq.layers.softmax import windowed_read

Read = Callable[[Tensor, Tensor, Tensor], Tensor]
Steps = Iterator[list[Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rival:
    """Another mixer.

    Attributes:
        label: Its name in tables; `{window}` stands for the width of a window.
        kernels: On a GPU, a regular expression that one of its kernels must match, as proof that this
            implementation was measured.
        cost: How its products are counted: `"exact"`, `"window"` or `"state"`.
        products: Number of products with its `[K, V]` state per token, if it has one.
        is_token_first: Whether it takes `[B, T, H, D]` rather than `[B, H, T, D]`.
        read: Returns the measured function of q, k and v, given the scale and the window.
        decode: Likewise for decoding a token after a context, given the inputs of each step and the scale.
            Inputs are the query and a cache, or the token's q, k and v if the mixer has a state. None: not
            measured.
    """

    label: str
    kernels: str = ""
    cost: str
    products: int = 0
    is_token_first: bool = False
    read: Callable[[float, int], Read]
    decode: Callable[[Steps, float], Callable[[], Tensor]] | None = None


def _exact(label: str, backend: SDPBackend | None = None, kernels: str = "") -> Rival:
    """PyTorch's exact attention, with a given backend or the one it chooses."""

    def pinned() -> AbstractContextManager[None]:
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def read(scale: float, window: int) -> Read:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with pinned():
                return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

        return call

    def decode(steps: Steps, scale: float) -> Callable[[], Tensor]:
        def call() -> Tensor:
            q, k, v = next(steps)
            with pinned():
                return scaled_dot_product_attention(q, k, v, scale=scale)

        return call

    return Rival(label=label, kernels=kernels, cost="exact", read=read, decode=decode)


def _window(scale: float, window: int) -> Read:
    # It takes queries that are already scaled.
    return lambda q, k, v: windowed_read(q * scale, k, v, None, window=window)


def _flex_window(scale: float, window: int) -> Read:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    compiled = torch.compile(flex_attention)
    masks: dict[int, BlockMask] = {}

    def is_seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    def read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        # Built once, as in a model, which builds it once for all layers.
        if length not in masks:
            masks[length] = create_block_mask(is_seen, None, None, length, length, device=q.device)
        return compiled(q, k, v, block_mask=masks[length], scale=scale)

    return read


def _recurrent(label: str, module: str, rule: str, *, kernels: str, products: int, has_rate: bool) -> Rival:
    """A recurrence of flash-linear-attention: `chunk_RULE` and, for decoding, `fused_recurrent_RULE`."""

    def gates(v: Tensor) -> dict[str, Any]:
        """Log decays `[B, T, H]`, close to 0, and rates, as a layer would compute them from its input."""
        rate = {"beta": v[..., 0].sigmoid()} if has_rate else {}
        return {"g": logsigmoid(v[..., 0].float() + 4), **rate}

    def read(scale: float, window: int) -> Read:
        chunked = getattr(importlib.import_module(module), f"chunk_{rule}")
        return lambda q, k, v: chunked(q, k, v, **gates(v), scale=scale)[0]

    def decode(steps: Steps, scale: float) -> Callable[[], Tensor]:
        recurrent = getattr(importlib.import_module(module), f"fused_recurrent_{rule}")
        q, k, v = next(steps)
        # `[B, H, K, V]`
        state = torch.randn(q.shape[0], *q.shape[2:], v.shape[3], device=q.device)
        options = gates(v) | {"scale": scale, "initial_state": state, "output_final_state": True}
        return lambda: recurrent(q, k, v, **options)[0]

    return Rival(
        label=label,
        kernels=kernels,
        cost="state",
        products=products,
        is_token_first=True,
        read=read,
        decode=decode,
    )


_SDPA = _exact("exact (SDPA)")

RIVALS = {
    "sdpa": _SDPA,
    "window": Rival(label="window of {window}", cost="window", read=_window, decode=_SDPA.decode),
    "sdpa_flash": _exact("exact, flash", SDPBackend.FLASH_ATTENTION, r"flash"),
    "sdpa_cudnn": _exact("exact, cuDNN", SDPBackend.CUDNN_ATTENTION, r"cudnn"),
    "sdpa_efficient": _exact("exact, efficient", SDPBackend.EFFICIENT_ATTENTION, r"fmha|efficient"),
    "flex_window": Rival(
        label="window, FlexAttention", kernels=r"flex_attention|triton_tem", cost="window", read=_flex_window
    ),
    "gated_deltanet": _recurrent(
        "Gated DeltaNet, fla",
        "fla.ops.gated_delta_rule",
        "gated_delta_rule",
        kernels=r"delta_rule|chunk_fwd|recurrent",
        products=3,
        has_rate=True,
    ),
    "mamba2": _recurrent(
        "Mamba2, fla",
        "fla.ops.simple_gla",
        "simple_gla",
        kernels=r"gla|chunk_fwd|recurrent",
        products=2,
        has_rate=False,
    ),
}
"""All rivals by name, which is `mixer` in rows."""

ON_CPU = ("sdpa", "window")
"""Rivals that are measured on a CPU; all others are measured on a GPU."""
