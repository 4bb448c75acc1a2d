"""What mixers with heads of queries, keys and values share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ovq.layers.base import Mixer
from ovq.layers.sizes import checked_head_dim


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

    def heads(self, channels: Tensor) -> tuple[Tensor, ...]:
        """Queries `[B, T, H, K]`, keys and values `[B, T, Hkv, K]`."""
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        return channels.unflatten(-1, (-1, self.head_dim)).split(sizes, dim=2)
