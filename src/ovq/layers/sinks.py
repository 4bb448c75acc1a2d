"""A sliding window with attention sinks (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.fields import ConfigField
from ovq.layers.cache import LayerCache
from ovq.layers.constant import ConstantStateMixer
from ovq.layers.heads import AttentionMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import num_bytes
from ovq.layers.softmax import fold, softmax_attention
from ovq.ops.options import check_sizes
from ovq.ops.parts import StateSpec, slot_spec

NUM_SINKS = 4
# 1,024 tokens with the sinks, as in the paper's experiments.
SINK_WINDOW = 1020


class SinkAttention(ConstantStateMixer, AttentionMixer):
    """Causal softmax attention over the first S tokens of a row and the last W: O(T (W + S)) time.

    Token t of a row sees tokens `0 .. S - 1` and `t - W + 1 .. t`. Like the other long-range mixers here, it
    has no positional encoding, so positions need not be reassigned within the cache as in StreamingLLM.

    Args:
        num_sinks: S, the number of first tokens that stay visible; at least 1.
        sink_window: W, the number of last tokens that a query sees, including its own; at least 2.
        args, kwargs: those of `AttentionMixer`.

    Raises:
        ValueError: if a value is out of range.

    Example:
        >>> layer = SinkAttention(32, num_heads=2, num_sinks=4, sink_window=8)
        >>> _, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> cache.layers[0].state["keys"].shape, cache.layers[0].state["sink_keys"].shape
        (torch.Size([1, 2, 7, 16]), torch.Size([1, 2, 4, 16]))
    """

    state_kind = "the keys and values of sinks and a window"
    config_fields = AttentionMixer.config_fields | {
        "num_sinks": ConfigField(int, NUM_SINKS, "first tokens of a row that stay visible", at_least=1),
        "sink_window": ConfigField(
            int, SINK_WINDOW, "last tokens that are seen besides, the current one included", at_least=2
        ),
    }
    supports_logn = False

    def __init__(
        self,
        *args: Any,
        num_sinks: int = NUM_SINKS,
        sink_window: int = SINK_WINDOW,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        check_sizes(1, num_sinks=num_sinks)
        check_sizes(2, sink_window=sink_window)
        self.num_sinks, self.sink_window = num_sinks, sink_window

    @classmethod
    def equal_sizes(cls, config: Any) -> dict[str, int]:
        """The smallest `sink_window` whose state has the bytes of a full dictionary, in float32."""
        num_kv_heads, head_dim, dtype = config.num_key_value_heads, config.head_dim, torch.float32
        slots = slot_spec(
            config.num_slots,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            chunk_size=config.chunk_size,
            dtype=dtype,
            has_weights=config.merge_gate or config.forget_gate,
            forgets=config.forget_gate,
        )
        # Both states include the number of tokens seen.
        del slots["num_seen"]
        num_tokens = -(-num_bytes(slots) // (2 * num_kv_heads * head_dim * dtype.itemsize))
        return {"sink_window": max(2, num_tokens - config.num_sinks + 1)}

    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """Keys and values of the sinks and of the last W - 1 tokens, and the number of tokens seen."""
        sinks = (self.num_kv_heads, self.num_sinks, self.head_dim)
        window = (self.num_kv_heads, self.sink_window - 1, self.head_dim)
        tensors = {"sink_keys": sinks, "sink_values": sinks, "keys": window, "values": window}
        return {name: (shape, dtype) for name, shape in tensors.items()} | {"num_seen": ((), torch.int64)}

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
        rows = layout.rows()
        q = (q * scale[:, None]).to(v.dtype)
        q, k, v = (rows.take(x).transpose(1, 2) for x in (q, k.to(v.dtype), v))
        lengths = rows.lengths(q.transpose(1, 2))
        state = self.state_before(cache, q.shape[0], v)
        before = state["num_seen"]
        new = {"num_seen": before + lengths}
        for name, x in (("keys", k), ("values", v)):
            new[f"sink_{name}"] = _with_first(state[f"sink_{name}"], x, before, lengths)
        if cache is None or cache.state is None:
            past_k, past_v = k[:, :, :0], v[:, :, :0]
        else:
            past_k, past_v = state["keys"], state["values"]
        k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
        o = sink_read(q, k, v, new["sink_keys"], new["sink_values"], before, window=self.sink_window)
        if cache is not None:
            for name, x in (("keys", k), ("values", v)):
                new[name] = _last(x, x.shape[2] - q.shape[2] + lengths, self.sink_window - 1)
            cache.set_state(new, layout.num_new)
        return rows.put(o.transpose(1, 2))


def sink_read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_keys: Tensor,
    sink_values: Tensor,
    num_seen: Tensor,
    *,
    window: int,
) -> Tensor:
    """Softmax attention `[B, H, T, V]` of each token to the sinks and to its window, in blocks of queries.

    Args:
        q: `[B, H, T, K]`, scaled; the first query of row b is the row's token `num_seen[b]`.
        k: `[B, Hkv, P + T, K]`: P keys before the queries (short rows have fewer real ones), then the keys of
            the queries' own tokens.
        v: `[B, Hkv, P + T, V]`, likewise.
        sink_keys: `[B, Hkv, S, K]`, the first tokens of each row; tokens not read yet are ignored.
        sink_values: `[B, Hkv, S, V]`, likewise.
        num_seen: `[B]` number of tokens of each row before the queries.
        window: W, at least 2.
    """
    batch_size, _, num_queries, _ = q.shape
    size = min(num_queries, window)
    num_blocks = -(-num_queries // size)
    fill = num_blocks * size - num_queries
    if num_blocks > 1:
        # Each block includes the preceding keys that its first query sees.
        k, v = (F.pad(x, (0, 0, window - 1 - (x.shape[2] - num_queries), fill)) for x in (k, v))
    num_past = k.shape[2] - num_queries - fill
    num_keys = num_past + size
    q = fold(F.pad(q, (0, 0, 0, fill)), size, size)
    k, v = (
        torch.cat([sinks.repeat_interleave(num_blocks, dim=0), fold(x, num_keys, size)], dim=2)
        for sinks, x in ((sink_keys, k), (sink_values, v))
    )
    # Positions in the row: [B n, size, 1] for the queries, [B n, 1, keys] for the keys.
    first = (num_seen[:, None] + torch.arange(num_blocks, device=q.device) * size).flatten()[:, None, None]
    query = first + torch.arange(size, device=q.device)[:, None]
    key = first - num_past + torch.arange(num_keys, device=q.device)
    sink = torch.arange(sink_keys.shape[2], device=q.device)
    in_window = (key >= 0) & (key <= query) & (key > query - window)
    # A sink inside the window must not be counted twice.
    is_seen = torch.cat([(sink <= query - window), in_window], dim=-1)
    o = softmax_attention(q, k, v, mask=is_seen[:, None])
    return o.unflatten(0, (batch_size, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :num_queries]


def _with_first(sinks: Tensor, x: Tensor, num_seen: Tensor, lengths: Tensor) -> Tensor:
    """`sinks` `[B, Hkv, S, D]`, updated with new tokens `x` `[B, Hkv, T, D]` among the first S of a row."""
    place = torch.arange(sinks.shape[2], device=x.device) - num_seen[:, None]
    is_new = (place >= 0) & (place < lengths[:, None])
    index = place.clamp(0, x.shape[2] - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return torch.where(is_new[:, None, :, None], x.gather(2, index), sinks)


def _last(x: Tensor, end: Tensor, num_kept: int) -> Tensor:
    """The last `num_kept` tokens of `x` `[B, Hkv, L, D]` before `end` `[B]`, left-padded with zeros."""
    x = F.pad(x, (0, 0, num_kept, 0))
    index = end[:, None] + torch.arange(num_kept, device=x.device)
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
