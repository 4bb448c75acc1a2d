"""The kind of contexts (`ovq.hf.context`) that converted models make, and the checks of their files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovq.convert.cache import HeadMemories, MemoryCache
from ovq.convert.config import MemoryConfig
from ovq.hf.context_file import KINDS, Kind, Tensors, check_names
from ovq.layers.memory import check_num_seen
from ovq.ops.parts import check_tensors, of_rows
from ovq.ops.serialization import check_state_tensors

#: Name of this kind of contexts.
KIND = "converted"

_RENAMED = {"recent_keys": "pending_keys", "recent_values": "pending_values", "use": "token_use"}


def _check(
    where: str, layers: Sequence[Tensors], config: MemoryConfig, dtype: torch.dtype, num_tokens: int
) -> None:
    """Raise ValueError unless the tensors can be memories of layers that have read `num_tokens` tokens."""
    for i, tensors in enumerate(layers):
        place = f"{where}: layer {i}"
        memory = HeadMemories(config=config.layer(i))
        spec = of_rows(memory.spec(tensors, dtype), 1)
        check_names(place, tensors, spec)
        check_tensors(place, tensors, spec)
        for budget, own in zip(config.layer(i).budgets, memory.by_group(tensors), strict=True):
            check_num_seen(place, own, num_tokens)
            check_state_tensors(place, own, **budget.sizes)


def _upgraded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a layer from an old file, which had names of their own for heads of converted models."""
    found = {}
    for name, x in tensors.items():
        group, _, own = name.partition(".")
        found[f"{group}.{_RENAMED.get(own, own)}"] = x
    for group in {name.partition(".")[0] for name in found}:
        numbers = [found.get(f"{group}.{name}") for name in ("filled", "num_merged")]
        # Others cannot always be added.
        if all(x is not None and (x.dtype, x.shape) == (torch.int64, (1,)) for x in numbers):
            filled, num_merged = (found.pop(f"{group}.{name}") for name in ("filled", "num_merged"))
            # How many of them are merged follows from their number.
            found[f"{group}.num_seen"] = filled + num_merged
    return found


KINDS[KIND] = Kind(
    upgraded=lambda fields: MemoryConfig.from_dict(fields).to_dict(),
    tensors=_upgraded,
    config=MemoryConfig.from_dict,
    cache=MemoryCache,
    check=_check,
    size=lambda config: f"{config.rows_per_head:.0f} rows per head on average",
)
