"""The base classes of mixers with heads of queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ovq.fields import ConfigField, is_finite
from ovq.layers import defaults
from ovq.layers.base import Mixer
from ovq.layers.cache import LayerCache
from ovq.layers.common import QKNorm, rotary_tables
from ovq.layers.gates import OutputGate
from ovq.layers.layout import SequenceLayout
from ovq.layers.logn import check_logn_length, logn_factors
from ovq.layers.memory import Memory
from ovq.layers.sizes import check_rotary, checked_head_dim
from ovq.ops.backends.cpu.layer import TokenMemory


class HeadsMixer(Mixer):
    """A mixer whose channels are queries of H heads, and keys and values of Hkv heads.

    Args:
        hidden_size: width of the model.
        num_heads: query heads H.
        num_kv_heads: key/value heads Hkv; divides H. None: as many as query heads.
        head_dim: K, which is also V. None: `hidden_size / num_heads`.
        kwargs: `conv_size` and `layer_idx` of `Mixer`.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    config_fields = Mixer.config_fields | {
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
    }

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        **kwargs: Any,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = checked_head_dim(hidden_size, num_heads, num_kv_heads, head_dim)
        super().__init__(
            hidden_size,
            num_channels=(num_heads + 2 * num_kv_heads) * head_dim,
            num_outputs=num_heads * head_dim,
            **kwargs,
        )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim

    def split_heads(self, channels: Tensor) -> tuple[Tensor, ...]:
        """Queries `[B, T, H, K]`, keys and values `[B, T, Hkv, K]`."""
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        return channels.unflatten(-1, (-1, self.head_dim)).split(sizes, dim=2)


class AttentionMixer(HeadsMixer):
    """A mixer with L2-normalised queries and keys and one temperature per head, as in OVQ.

    Such mixers differ only in `attend` and in their state.

    Args:
        hidden_size, num_heads, num_kv_heads, head_dim: as in `HeadsMixer`.
        rope_theta: base of the rotary frequencies.
        logn_length: see `set_logn_length`; usually the training length, None for no scaling. Only full
            attention and OVQ support it.
        output_gate: whether to normalise and gate the outputs, see `ovq.layers.gates.OutputGate`.
        kwargs: `conv_size`, `layer_idx` and `use_rope` of `Mixer`.

    Raises:
        ValueError: if sizes are inconsistent.
    """

    config_fields = HeadsMixer.config_fields | {
        "rope_theta": "rope_theta",
        "output_gate": ConfigField(bool, False, "whether attention layers normalise and gate their outputs"),
    }
    #: Whether the mixer supports log-n scaling: its reads grow with the length, and the effect was measured.
    supports_logn: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        rope_theta: float = defaults.ROPE_THETA,
        logn_length: int | None = defaults.LOGN_LENGTH,
        output_gate: bool = False,
        **kwargs: Any,
    ):
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, **kwargs)
        if self.use_rope:
            check_rotary(self.head_dim)
        if not (is_finite(rope_theta) and rope_theta > 0):
            raise ValueError(f"expected a finite rope_theta above 0, found {rope_theta}")
        self.rope_theta = rope_theta
        self.qk_norm = QKNorm(num_heads, self.head_dim)
        if output_gate:
            self.output_gate = OutputGate(hidden_size, num_heads, self.head_dim)
        self.set_logn_length(logn_length)

    def set_logn_length(self, logn_length: int | None) -> None:
        """Set the length beyond which log-n scaling applies from here on; None turns it off.

        The t-th token of a row multiplies its logits by log t / log `logn_length` if that is above 1. Weights
        and caches do not change, as states do not depend on reads.

        Raises:
            ValueError: if the length is not an integer of at least 2, or the mixer does not support it.
        """
        check_logn_length(logn_length)
        if logn_length is not None and not self.supports_logn:
            raise ValueError(
                f"expected logn_length=None, found {logn_length}: {type(self).__name__} has no log-n scaling"
            )
        self.logn_length = logn_length

    @property
    def memory(self) -> Memory:
        """The `Memory` that handles the state of this layer."""
        return self.memory_of(self, rope_theta=self.rope_theta if self.use_rope else None)

    def token_memory(self, layout: SequenceLayout, cache: LayerCache) -> TokenMemory | None:
        """The memory that one new token per row reads, in the form of a kernel; None to use `attend`."""
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
    ) -> Tensor:
        """Mix the tokens of a call with each other and with the cached ones; to be overridden.

        A subclass with `forward_options` also takes the options that the caller gave. A subclass that needs
        the input of the layer overrides `mix` instead.

        Args:
            q: `[B, T, H, K]`, L2-normalised (and rotated), with log-n scaling applied, in float32 or float64.
                Not multiplied by `scale` yet.
            k: `[B, T, Hkv, K]`, L2-normalised (and rotated), likewise.
            v: `[B, T, Hkv, V]`, in the dtype of the activations.
            scale: `[H]`, the learned factor on the logits of each query head.
            layout: padding and packing of the call.
            cache: this layer's cache, which is read and updated; or None.

        Returns:
            `[B, T, H, V]` in the dtype of `v`. Padding columns may hold any finite value.
        """
        raise NotImplementedError(f"expected attend or mix of {type(self).__name__}, found neither")

    def mix(
        self,
        channels: Tensor,
        hidden_states: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
        **options: Any,
    ) -> Tensor:
        """See `Mixer.mix`; calls `attend` with the results of `heads`."""
        return self.attend(*self.heads(channels, layout), layout, cache, **options).flatten(2)

    def heads(
        self, channels: Tensor, layout: SequenceLayout, num_seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arguments q, k, v, scale of `attend`, with normalised (and rotated) queries and keys.

        See `SequenceLayout.places` for `num_seen`.
        """
        tables = self.rotary_tables(layout, channels)
        q, k, v, scale = self.qk_norm(channels, self.num_kv_heads, tables)
        if self.logn_length is not None:
            factors = logn_factors(layout, self.logn_length, like=q, num_seen=num_seen)
            q = q if factors is None else q * factors[..., None, None]
        return q, k, v, scale

    def rotary_tables(self, layout: SequenceLayout, channels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Rotary tables of a call, computed once for all its layers; None without rotary embedding.

        See `SequenceLayout.positions`.
        """
        if not self.use_rope:
            return None
        dtype = torch.promote_types(channels.dtype, torch.float32)
        like = torch.empty(0, dtype=dtype, device=channels.device)
        return layout.once(
            ("rotary", self.head_dim, self.rope_theta, dtype, like.device),
            lambda: rotary_tables(
                layout.positions(like.device), self.head_dim, theta=self.rope_theta, like=like
            ),
        )
