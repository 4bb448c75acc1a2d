"""OVQ attention as a layer: linear time, constant memory, exact within a chunk (arXiv 2602.03922)."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.layers import defaults
from ovq.layers.base import AttentionMixer
from ovq.layers.cache import SlotCache
from ovq.layers.layout import SequenceLayout
from ovq.ops import ovq_attention
from ovq.ops.schedule import scheduled_slots

#: Options of the op that say how the dictionary is learned. The layer and the config call them the same.
LEARNING_OPTIONS = ("growth", "init", "merge", "bias", "rate")


class OVQAttention(AttentionMixer):
    """Attention over a dictionary of at most `num_slots` slots learned online, and the current chunk exactly.

    Args:
        hidden_size: width of the model.
        num_heads: query heads H.
        num_kv_heads: key/value heads Hkv; divides H. None: as many as query heads.
        head_dim: K (and V). None: `hidden_size / num_heads`.
        num_slots: N, the most slots a key/value head may hold.
        chunk_size: C, tokens that are read exactly before they are merged; part of the model.
        conv_size: taps of the causal depthwise convolution on q, k and v; 0 for none.
        layer_idx: the layer's place in the cache; None stands for 0.
        growth: schedule of the dictionary: `"plateau"`, `"linear"` or `"immediate"`.
        init: which keys open slots: `"novelty"` or `"random"`.
        merge: slots a key may be merged into: `"existing"` or `"updated"`.
        bias: what is added to the scores of slots: `"count"` or `"count+norm"`.
        rate: how far a slot moves to a key merged into it: `"count"` or a number in (0, 1].
        backend: of `ovq.ops.ovq_attention`.
        use_rope: rotate queries and keys by position.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: sizes that do not fit each other, or (on the first call) an option the op does not know.

    Example:
        >>> layer = OVQAttention(32, num_heads=2, num_slots=16, chunk_size=8)
        >>> o, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> o.shape, cache.layers[0].state.num_seen.tolist()
        (torch.Size([1, 20, 32]), [20])
    """

    forward_options = frozenset({"generator"})
    config_fields = ("num_slots", "chunk_size", *LEARNING_OPTIONS)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        num_slots: int = defaults.NUM_SLOTS,
        chunk_size: int = defaults.CHUNK_SIZE,
        conv_size: int = defaults.CONV_SIZE,
        layer_idx: int | None = None,
        *,
        growth: str = defaults.GROWTH,
        init: str = defaults.INIT,
        merge: str = defaults.MERGE,
        bias: str = defaults.BIAS,
        rate: float | str = defaults.RATE,
        backend: str = "auto",
        use_rope: bool = False,
        rope_theta: float = defaults.ROPE_THETA,
    ):
        super().__init__(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            conv_size=conv_size,
            layer_idx=layer_idx,
            use_rope=use_rope,
            rope_theta=rope_theta,
        )
        if chunk_size < 1:
            raise ValueError(f"expected chunk_size of at least 1, found {chunk_size}")
        self.chunk_size = chunk_size
        self.growth, self.init, self.merge, self.backend = growth, init, merge, backend
        self.bias, self.rate = bias, rate
        self.set_num_slots(num_slots)

    def set_num_slots(self, num_slots: int) -> None:
        """Let the dictionary hold `num_slots` slots from here on; cached states are resized when next used.

        More slots at test time than in training is how a trained layer remembers more.
        """
        if num_slots < 1:
            raise ValueError(f"expected num_slots of at least 1, found {num_slots}")
        self.num_slots = num_slots

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        layout: SequenceLayout,
        cache: SlotCache | None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """See `AttentionMixer.attend`; `generator` seeds `init="random"`."""
        state = None if cache is None else cache.state
        if state is not None and state.num_slots != self.num_slots:
            state = state.resize(self.num_slots)
        o, state = ovq_attention(
            q.to(v.dtype),
            k.to(v.dtype),
            v,
            num_slots=self.num_slots,
            chunk_size=self.chunk_size,
            scale=scale,
            initial_state=state,
            output_final_state=cache is not None,
            attention_mask=layout.bounds,
            **{option: getattr(self, option) for option in LEARNING_OPTIONS},
            generator=generator,
            backend=self.backend,
        )
        if cache is not None:
            cache.set_state(state, layout.num_new)
        return o

    @property
    def cache_kind(self) -> str:
        """An `OVQState`."""
        return SlotCache.kind

    def new_cache(self) -> SlotCache:
        """An empty cache for this layer."""
        return SlotCache()

    def num_open(self, num_tokens: int) -> int:
        """Slots a head has in use after `num_tokens` tokens of a row."""
        num_merged = num_tokens - num_tokens % self.chunk_size
        if not num_merged:
            return 0
        # From the first token on no schedule asks a chunk for more slots than it has tokens: there is no need
        # to go through all chunks, and a file may claim any number of them.
        return scheduled_slots(num_merged, num_slots=self.num_slots, growth=self.growth)

    def memory_bytes(self, num_tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the `OVQState` of one row: sums, counts, pending buffers and the token counter."""
        sum_bytes = torch.promote_types(dtype, torch.float32).itemsize
        count_bytes = seen_bytes = torch.int64.itemsize
        slots = self.num_open(num_tokens) * (2 * self.head_dim * sum_bytes + count_bytes)
        pending = self.chunk_size * 2 * self.head_dim * dtype.itemsize
        return self.num_kv_heads * (slots + pending) + seen_bytes
