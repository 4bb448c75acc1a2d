"""Sizes of mixers: checks, and the size of an OVQ layer, by which others are compared."""

from __future__ import annotations

from typing import Any

from ovq.ops.options import check_sizes


def checked_head_dim(hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> int:
    """The head size, by default `hidden_size / num_heads`. Raises ValueError if sizes are inconsistent."""
    check_sizes(1, hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
    if num_heads % num_kv_heads:
        raise ValueError(
            "expected num_kv_heads to divide num_heads, "
            f"found num_heads={num_heads}, num_kv_heads={num_kv_heads}"
        )
    if head_dim is None and hidden_size % num_heads:
        raise ValueError(
            f"expected num_heads to divide hidden_size (or a head_dim), "
            f"found hidden_size={hidden_size}, num_heads={num_heads}"
        )
    head_dim = hidden_size // num_heads if head_dim is None else head_dim
    check_sizes(1, head_dim=head_dim)
    return head_dim


def num_projected(config: Any) -> int:
    """Vectors of all projections of an `"ovq"` layer: 2 (H + Hkv) K, and H K more with an output gate."""
    num_heads = config.num_attention_heads
    vectors = 2 * (num_heads + config.num_key_value_heads)
    return (vectors + (num_heads if getattr(config, "output_gate", False) else 0)) * config.head_dim


def check_conv_size(conv_size: int) -> None:
    """Raise ValueError unless `conv_size` is a valid kernel size."""
    if not isinstance(conv_size, int) or conv_size < 0 or conv_size == 1:
        raise ValueError(f"expected conv_size 0 (none) or an integer of at least 2, found {conv_size!r}")


def check_rotary(head_dim: int) -> None:
    """Raise ValueError unless keys of this size support rotary embedding."""
    if head_dim % 2:
        raise ValueError(f"expected an even head_dim with rotary embedding, found {head_dim}")
