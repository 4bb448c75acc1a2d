"""Exact softmax attention over all earlier tokens or a sliding window: the baselines of OVQ.

Projections, convolution, normalisation and temperature are as in OVQ; the layers differ only in memory.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.layers import defaults
from ovq.layers.cache import LayerCache
from ovq.layers.heads import AttentionMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec, TensorMemory
from ovq.layers.products import is_plain
from ovq.ops.backends.cpu.layer import TokenMemory, memory_of_window
from ovq.ops.backends.cpu.tokens import applied, can_run
from ovq.ops.backends.cpu.window import CompiledWindow
from ovq.ops.options import check_sizes


class FullAttention(AttentionMixer):
    """Causal softmax attention over all earlier tokens: quadratic time, a cache that grows with every token.

    The arguments are those of `AttentionMixer`.

    Example:
        >>> layer = FullAttention(32, num_heads=2)
        >>> layer(torch.randn(1, 20, 32))[0].shape
        torch.Size([1, 20, 32])
    """

    config_fields = AttentionMixer.config_fields | {"logn_length": "logn_length"}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
    ) -> Tensor:
        """See `AttentionMixer.attend`."""
        q = (q * scale[:, None]).to(v.dtype)
        # From here on [B, H, T, K], the layout of `scaled_dot_product_attention` and the caches.
        k, v = self.with_past(k.to(v.dtype).transpose(1, 2), v.transpose(1, 2), layout, cache)
        return self.softmax_read(q.transpose(1, 2), k, v, layout).transpose(1, 2)

    def with_past(
        self, k: Tensor, v: Tensor, layout: SequenceLayout, cache: LayerCache | None
    ) -> tuple[Tensor, Tensor]:
        """Cached and new keys and values, concatenated; the new ones are `[B, Hkv, T, K]`. Updates the cache.

        Raises:
            ValueError: if the cached ones have other rows, heads or components, or another dtype.
        """
        if cache is None:
            return k, v
        # Copies even on the first call, as views would keep the projections in memory.
        past = cache.state or {"keys": k[:, :, :0], "values": v[:, :, :0]}
        if (found := past["keys"].dtype) != k.dtype:
            raise ValueError(
                f"past_key_values: expected keys and values in {k.dtype}, as the layer computes them, found "
                f"them in {found}: the cache is of a model in another dtype"
            )
        own, cached = ([x.shape[0], x.shape[1], x.shape[3]] for x in (k, past["keys"]))
        if cached != own:
            raise ValueError(
                f"past_key_values: expected keys and values of {own} (rows, heads, components), as the layer "
                f"computes them, found {cached}"
            )
        k, v = torch.cat([past["keys"], k], dim=2), torch.cat([past["values"], v], dim=2)
        cache.set_state({"keys": self.kept(k), "values": self.kept(v)}, layout.num_new)
        return k, v

    def softmax_read(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        """Attention of scaled `q [B,H,T,K]` over `k, v [B,Hkv,S,K]`; the last T keys are the queries' own."""
        if layout.cu_seqlens is None:
            return causal_read(q, k, v, layout.segments(k.shape[2]))
        # Row by row, which costs the sum of squared lengths, not the square of their sum.
        rows = [slice(a, b) for a, b in itertools.pairwise(layout.cu_seqlens.tolist()) if a < b]
        outputs = [softmax_attention(q[:, :, r], k[:, :, r], v[:, :, r], is_causal=True) for r in rows]
        return torch.cat(outputs, dim=2)

    def num_kept(self, num_tokens: int) -> int:
        """Number of keys and values kept after `num_tokens` tokens: those that later queries may see."""
        return num_tokens

    def kept(self, x: Tensor) -> Tensor:
        """The part to keep of the keys or values `[B, Hkv, T, D]` of all available tokens."""
        return x

    @classmethod
    def memory_of(cls, settings: Any, *, rope_theta: float | None = None) -> TensorMemory:
        """See `Mixer.memory_of`."""
        return TensorMemory(kind="all keys and values", rope_theta=rope_theta, is_by_column=True)

    def memory_spec(self, num_tokens: int, dtype: torch.dtype) -> StateSpec:
        """See `Mixer.memory_spec`."""
        kept = ((self.num_kv_heads, self.num_kept(num_tokens), self.head_dim), dtype)
        return {"keys": kept, "values": kept}


class SlidingWindowAttention(FullAttention):
    """Causal softmax attention over the last W = `sliding_window` tokens: time and memory O(T W).

    Token t sees tokens `t - W + 1 .. t`, as in transformers.

    Args:
        sliding_window: W, the number of tokens that a query sees, including its own; at least 2.
        use_rope: as in `Mixer`, but on by default.
        args, kwargs: those of `AttentionMixer`.

    Raises:
        ValueError: if a value is out of range.

    Example:
        >>> layer = SlidingWindowAttention(32, num_heads=2, sliding_window=8)
        >>> x = torch.randn(1, 20, 32)
        >>> _, _, cache = layer(x, use_cache=True)
        >>> cache.layers[0].state["keys"].shape
        torch.Size([1, 2, 7, 16])
    """

    config_fields = AttentionMixer.config_fields | {"sliding_window": "sliding_window"}
    supports_logn = False

    def __init__(
        self,
        *args: Any,
        sliding_window: int = defaults.SLIDING_WINDOW,
        use_rope: bool = True,
        **kwargs: Any,
    ):
        super().__init__(*args, use_rope=use_rope, **kwargs)
        check_sizes(2, sliding_window=sliding_window)
        self.sliding_window = sliding_window

    def num_kept(self, num_tokens: int) -> int:
        """See `FullAttention.num_kept`."""
        return min(num_tokens, self.sliding_window - 1)

    def kept(self, x: Tensor) -> Tensor:
        """See `FullAttention.kept`."""
        num = self.num_kept(x.shape[2])
        kept = x[:, :, x.shape[2] - num :]
        if torch.compiler.is_compiling():
            # Compiled graphs specialise on strides; contiguous ones are the same in each step.
            return kept.contiguous()
        # A copy, as a view would keep the whole sequence in memory; one extra token, as in decoding, is fine.
        return kept if x.shape[2] <= num + 1 else kept.clone()

    @classmethod
    def memory_of(cls, settings: Any, *, rope_theta: float | None = None) -> TensorMemory:
        """See `Mixer.memory_of`."""
        return TensorMemory(
            kind=f"the keys and values of a window of {settings.sliding_window}",
            rope_theta=rope_theta,
            is_by_column=True,
        )

    def token_memory(self, layout: SequenceLayout, cache: LayerCache) -> TokenMemory | None:
        """See `AttentionMixer.token_memory`."""
        if not is_plain(self, SlidingWindowAttention) or cache.state is None:
            return None
        keys, values = cache.state["keys"], cache.state["values"]
        num_before, dim = keys.shape[2], self.head_dim
        is_fit = keys.shape == values.shape and keys.shape[1::2] == (self.num_kv_heads, dim)
        # The keys and values of a head must be contiguous.
        is_fit &= all(x.stride()[2:] == (dim, 1) for x in (keys, values))
        if not is_fit or num_before >= self.sliding_window or not can_run(keys, values):
            return None

        def finished(keys: Tensor, values: Tensor) -> dict[str, Tensor]:
            return {"keys": self.kept(keys), "values": self.kept(values)}

        first = self._first_seen(layout, num_before + 1, keys.device)
        return memory_of_window(keys, values, first, finished, num_heads=self.num_heads)

    def _first_seen(self, layout: SequenceLayout, num_keys: int, device: torch.device) -> Tensor | None:
        """See `SequenceLayout.first_seen`; computed once for all layers."""
        return layout.once(("first seen", num_keys, device), lambda: layout.first_seen(num_keys))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
    ) -> Tensor:
        """See `AttentionMixer.attend`."""
        if not can_run(q, k, v, scale):
            return super().attend(q, k, v, scale, layout, cache)
        k, v = self.with_past(k.transpose(1, 2), v.transpose(1, 2), layout, cache)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        first = self._first_seen(layout, k.shape[1], k.device)
        return applied(CompiledWindow, q, k, v, scale, first, self.sliding_window)

    def softmax_read(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        """As in `FullAttention`, within the window."""
        return windowed_read(q, k, v, layout.segments(k.shape[2]), window=self.sliding_window)


def causal_read(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None) -> Tensor:
    """Causal softmax attention `[B, H, T, V]`.

    Args:
        q: `[B, H, T, K]`, scaled.
        k: `[B, Hkv, S, K]`; the last T keys are the queries' own.
        v: `[B, Hkv, S, V]`.
        segments: `[B, S]` row indices; a token sees only its own row. None: one row.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if segments is None and num_queries == num_keys:
        return softmax_attention(q, k, v, is_causal=True)
    if segments is None and num_queries == 1:
        return softmax_attention(q, k, v)
    return softmax_attention(q, k, v, mask=_allowed(num_queries, num_keys, None, segments, q.device))


def windowed_read(q: Tensor, k: Tensor, v: Tensor, segments: Tensor | None, *, window: int) -> Tensor:
    """Causal softmax attention over a window, block by block: O(T * window) time and memory.

    Arguments and result are as in `causal_read`. Queries are split into blocks of `window`; a block attends
    to its own keys and those of the previous block, which include all keys that its queries may see.
    """
    num_queries = q.shape[2]
    # Number of keys outside of every query's window, which must be cached ones.
    drop = max(k.shape[2] - num_queries - (window - 1), 0)
    k, v = k[:, :, drop:], v[:, :, drop:]
    segments = None if segments is None else segments[:, drop:]
    num_cached = k.shape[2] - num_queries

    first = min(num_queries, window)
    num_keys = num_cached + first
    head_segments = None if segments is None else segments[:, :num_keys]
    mask = _allowed(first, num_keys, window, head_segments, q.device)
    head = softmax_attention(q[:, :, :first], k[:, :, :num_keys], v[:, :, :num_keys], mask=mask)
    if first == num_queries:
        return head

    num_rest = num_queries - first
    num_blocks = -(-num_rest // window)
    fill = num_blocks * window - num_rest
    # Fold the n blocks into the batch: queries [B n, H, W, K], keys of two blocks [B n, Hkv, 2 W, K].
    blocks = fold(F.pad(q[:, :, first:], (0, 0, 0, fill)), window, window)
    keys = fold(F.pad(k[:, :, num_cached:], (0, 0, 0, fill)), 2 * window, window)
    values = fold(F.pad(v[:, :, num_cached:], (0, 0, 0, fill)), 2 * window, window)
    if segments is not None:
        padded = F.pad(segments[:, num_cached:], (0, fill))
        segments = padded.unfold(1, 2 * window, window).flatten(0, 1)
    mask = _allowed(window, 2 * window, window, segments, q.device)
    rest = softmax_attention(blocks, keys, values, mask=mask)
    rest = rest.unflatten(0, (-1, num_blocks)).transpose(1, 2).flatten(2, 3)
    return torch.cat([head, rest[:, :, :num_rest]], dim=2)


def fold(x: Tensor, size: int, step: int) -> Tensor:
    """Split `[B, H, T, K]` into overlapping pieces of the time axis: `[B * pieces, H, size, K]`."""
    return x.unfold(2, size, step).transpose(1, 2).flatten(0, 1).transpose(-1, -2)


def _allowed(
    num_queries: int, num_keys: int, window: int | None, segments: Tensor | None, device: torch.device
) -> Tensor:
    """Mask of the keys that each query sees: bool `[T, S]`, or `[B, 1, T, S]` with segments.

    The last T of the S keys are the queries' own. A padding token sees only padding, including itself, so no
    row of the softmax is empty (which would give NaN).
    """
    key = torch.arange(num_keys, device=device)
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    if segments is not None:
        own = segments[:, num_keys - num_queries :, None]
        allowed = (allowed & (own == segments[:, None, :]))[:, None]
    return allowed


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """PyTorch's attention for scaled queries, with grouped-query attention if head numbers differ."""
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": is_causal, "scale": 1.0}
    # With dynamic shapes, a comparison of sizes must be branched on here and cannot be passed as a bool.
    if q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    return F.scaled_dot_product_attention(q, k, v, **options)
