"""Whether tokens are of the model and the rows whose memory a layer has.

Compiled kernels would read and write beyond the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from ovq.convert.config import LayerConfig
from ovq.convert.memory import HeadMemory


def check_fits(
    config: LayerConfig,
    memories: Sequence[HeadMemory] | None,
    k: Tensor,
    v: Tensor,
    q: Tensor | None = None,
) -> None:
    """Raise ValueError unless these tokens are of the model and of the rows whose memory this is.

    Args:
        config: what the layer keeps. memories: what it remembers; None before the first token.
        k: `[B, Hkv, T, K]`. v: `[B, Hkv, T, V]`. q: `[B, H, T, K]`, if there are queries.
    """
    num_heads = config.num_kv_heads
    if k.shape[1] != num_heads or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"expected keys and values of {num_heads} heads, as the config of the memory has, found "
            f"{tuple(k.shape)} and {tuple(v.shape)} (rows, heads, tokens, components)"
        )
    if q is not None and (q.shape[0] != k.shape[0] or q.shape[1] % num_heads or q.shape[3] != k.shape[3]):
        raise ValueError(
            f"expected queries like the keys {tuple(k.shape)}, of a multiple of {num_heads} heads, found "
            f"{tuple(q.shape)} (rows, heads, tokens, components)"
        )
    for wrong in misfits(config, None if q is None else q.shape[1], k.shape[3], v.shape[3]):
        raise ValueError(wrong)
    if memories is None:
        return
    kept = memories[0]
    expected = len(kept.filled), kept.recent_keys.shape[3], kept.recent_values.shape[3]
    if (found := (k.shape[0], k.shape[3], v.shape[3])) != expected:
        raise ValueError(
            f"expected keys and values of as many rows and components as the cache has, {expected}, "
            f"found {found}: the cache is of another model or another batch"
        )


def misfits(config: LayerConfig, num_heads: int | None, key_dim: int, value_dim: int) -> Iterator[str]:
    """In which fields a layer has not as many numbers as a model's heads need, in words.

    Args:
        config: what the layer keeps.
        num_heads: query heads; None where nothing is read.
        key_dim: components of a key. value_dim: of a value.
    """
    for name, expected in (("key_exponents", key_dim), ("token_use", key_dim + value_dim + 1)):
        if (found := {*map(len, getattr(config, name) or [])}) - {expected}:
            yield f"{name}: expected {expected} numbers per head, found {sorted(found)}"
    for name in ("slot_temperature", "slot_bias"):
        numbers = getattr(config, name)
        if None not in (numbers, num_heads) and len(numbers) != num_heads:
            yield f"{name}: expected {num_heads} numbers per layer, one per query head, found {len(numbers)}"
    if config.reach is not None and (num := len(config.reach.frequencies)) > key_dim // 2:
        yield f"rotary_frequencies: expected at most {key_dim // 2} for keys of {key_dim}, found {num}"
