"""The library's mixers on states, keys and values in vLLM's blocks. Nothing is implemented twice:
projections, convolution, normalisation, gates and the op are the library's."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from ovq.layers import LayerCache, Mixer, OVQAttention, SequenceLayout
from ovq.layers.common import ShortConvolution
from ovq.layers.constant import ConstantStateMixer
from ovq.layers.memory import StateSpec
from ovq.layers.softmax import FullAttention, SlidingWindowAttention
from ovq_vllm.state import StateBlocks, part_name
from ovq_vllm.step import Group, RequestLayout, Step


class BlockLayer(MambaBase):
    """A layer for which vLLM allocates one block per request.

    Args:
        spec: specification of a block.
        vllm_config: the config of the engine.
        prefix: the layer's name for vLLM.
    """

    def __init__(self, spec: StateSpec, vllm_config: VllmConfig, prefix: str) -> None:
        self._spec, self._prefix = spec, prefix
        vllm_config.compilation_config.static_forward_context[prefix] = self

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Its metadata backend, `ovq_vllm.step.StateBackend`."""
        return MambaAttentionBackendEnum.CUSTOM

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors of a block."""
        return tuple(shape for shape, _ in self._spec.values())

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the tensors of a block."""
        return tuple(dtype for _, dtype in self._spec.values())

    @property
    def step(self) -> Step | None:
        """The requests of the current step; None while vLLM profiles memory."""
        metadata = get_forward_context().attn_metadata
        return None if metadata is None else metadata[self._prefix]


class OVQLayer(BlockLayer):
    """An OVQ mixer, with its weights, whose states are in vLLM's blocks; arguments as `BlockLayer`."""

    def __init__(self, mixer: OVQAttention, spec: StateSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(spec, vllm_config, prefix)
        self._mixer = mixer
        self._blocks: StateBlocks | None = None
        self._tensors: dict[str, Tensor] = {}

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Use the memory that vLLM has allocated."""
        super().bind_kv_cache(kv_cache)
        self._tensors = dict(zip(self._spec, self.kv_cache, strict=True))
        self._blocks = StateBlocks(self._mixer, self._tensors)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Run the mixer on the new tokens `[T, hidden_size]` of all requests; updates their states."""
        mixer, step = self._mixer, self.step
        if step is None or self._blocks is None:
            return torch.zeros_like(hidden_states)
        channels = self.convolved(mixer, mixer.qkv_proj(hidden_states[None])[0], index=0)
        mixed = channels.new_zeros(len(channels), mixer.num_heads * mixer.head_dim)
        for group in step.groups:
            cache = LayerCache(mixer.memory)
            cache.state = self._blocks.read(group)
            inputs, own = group.take(channels), group.take(hidden_states)
            as_rows = not group.is_packed
            if as_rows and mixer.use_rope:
                # Packed, as positions differ between rows and the rotary tables have one per column.
                inputs, own, as_rows = inputs.transpose(0, 1), own.transpose(0, 1), False
            o = mixer.mix(inputs, own, group.layout(as_rows), cache)
            self._blocks.write(group, cache.state)
            group.put(o, mixed)
        return mixer.projected(mixed[None], hidden_states[None])[0]

    def part(self, mixer: Mixer, name: str, index: int) -> Tensor:
        """A tensor of this layer or of a guest, for all blocks; `part_name` gives its name."""
        return self._tensors[part_name(mixer, name, index)]

    def convolved(self, mixer: Mixer, channels: Tensor, *, index: int) -> Tensor:
        """Convolve the channels `[T, D]` of all new tokens, and store the last inputs of each request.

        Args:
            mixer: the mixer of this layer or of a guest.
            channels: the projected tokens.
            index: index of the guest; 0 for this layer.
        """
        step = self.step
        if mixer.qkv_conv is None or step is None:
            return channels
        kept = self.part(mixer, "conv_state", index)
        out = torch.zeros_like(channels)
        for group in step.groups:
            y, last = _convolve(mixer.qkv_conv, group, group.take(channels), group.read(kept))
            kept[group.blocks] = last
            group.put(y, out)
        return out


def _convolve(convolution: ShortConvolution, group: Group, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Convolve a group's rows, preceded by their last inputs `past`; also returns the inputs to store."""
    if not group.is_packed:
        return convolution(x, past)
    # One sequence, with each request's last inputs before its tokens; outputs for these inputs are dropped.
    num_back = past.shape[2]
    pieces = [
        torch.cat([before.T, new])
        for before, new in zip(past.unbind(), x[0].split(list(group.lengths)), strict=True)
    ]
    y, _ = convolution(torch.cat(pieces)[None])
    outputs = [piece[num_back:] for piece in y[0].split([len(piece) for piece in pieces])]
    return torch.cat(outputs)[None], torch.stack([piece[-num_back:].T for piece in pieces])


class ExactLayer:
    """A mixer with full or sliding-window attention, whose keys and values are in vLLM's pages.

    Args:
        mixer: the mixer, with its weights; its `attend` is replaced by vLLM's attention.
        prefix: the layer's name for vLLM.
        host: the OVQ layer whose blocks store the last inputs of the convolution.
        index: index of this layer in those blocks.
    """

    def __init__(self, mixer: FullAttention, prefix: str, host: OVQLayer, index: int) -> None:
        self._mixer, self._host, self._index = mixer, host, index
        window = mixer.sliding_window if isinstance(mixer, SlidingWindowAttention) else None
        # Scale 1, as `_attend` scales queries, with one factor per head. No `cache_config`: its window would
        # apply to layers of all kinds.
        self.attention = Attention(
            mixer.num_heads,
            mixer.head_dim,
            1.0,
            mixer.num_kv_heads,
            per_layer_sliding_window=window,
            prefix=prefix,
        )
        mixer.attend = self._attend

    def __call__(self, hidden_states: Tensor, layout: RequestLayout) -> Tensor:
        """Run the mixer on the new tokens `[T, hidden_size]` of all requests; appends keys and values."""
        mixer = self._mixer
        channels = mixer.qkv_proj(hidden_states[None])[0]
        channels = self._host.convolved(mixer, channels, index=self._index)
        x = hidden_states[None]
        return mixer.projected(mixer.mix(channels[None], x, layout, None), x)[0]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
    ) -> Tensor:
        """`AttentionMixer.attend` for all requests, by vLLM's paged attention."""
        q, k = (q * scale[:, None]).to(v.dtype), k.to(v.dtype)
        return self.attention(q.flatten(2)[0], k.flatten(2)[0], v.flatten(2)[0]).view(q.shape)


class ConstantLayer:
    """A mixer whose state is a few tensors of constant size, stored in the blocks of an OVQ layer.

    Args:
        mixer: the mixer, with its weights.
        host: the OVQ layer.
        index: index of this layer in its blocks.
    """

    def __init__(self, mixer: ConstantStateMixer, host: OVQLayer, index: int) -> None:
        self._mixer, self._host, self._index = mixer, host, index

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Run the mixer on the new tokens `[T, hidden_size]` of all requests; updates their states."""
        mixer, step = self._mixer, self._host.step
        if step is None:
            return torch.zeros_like(hidden_states)
        channels = mixer.qkv_proj(hidden_states[None])[0]
        channels = self._host.convolved(mixer, channels, index=self._index)
        names = mixer.constant_spec(channels.dtype)
        kept = {name: self._host.part(mixer, name, self._index) for name in names}
        mixed = channels.new_zeros(len(channels), mixer.o_proj.in_features)
        for group in step.groups:
            cache = LayerCache(mixer.memory)
            cache.state = {name: group.read(tensor) for name, tensor in kept.items()}
            o = mixer.mix(group.take(channels), group.take(hidden_states), group.rows, cache)
            for name, tensor in kept.items():
                tensor[group.blocks] = cache.state[name]
            group.put(o, mixed)
        return mixer.projected(mixed[None], hidden_states[None])[0]
