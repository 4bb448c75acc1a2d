"""The kind of contexts (`ovq.hf.context`) that converted models make, and the checks of their files."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ovq.convert.cache import HeadMemories, MemoryCache
from ovq.convert.config import MemoryConfig
from ovq.hf.context_file import KINDS, Kind, Tensors, check_names
from ovq.ops.parts import check_tensors, of_rows

#: Name of this kind of contexts.
KIND = "converted"


def _check(
    where: str, layers: Sequence[Tensors], config: MemoryConfig, dtype: torch.dtype, num_tokens: int
) -> None:
    """Raise ValueError unless the tensors can be memories of layers that have read `num_tokens` tokens."""
    for i, tensors in enumerate(layers):
        place = f"{where}: layer {i}"
        spec = of_rows(HeadMemories(config=config.layer(i)).spec(tensors, dtype), 1)
        check_names(place, tensors, spec)
        check_tensors(place, tensors, spec)
        for group, budget in enumerate(config.layer(i).budgets):
            filled, num_merged, count = (
                tensors[f"{group}.{name}"] for name in ("filled", "num_merged", "count")
            )
            if (num_read := filled + num_merged).tolist() != [num_tokens]:
                raise ValueError(f"{place}: expected {num_tokens} tokens read, found {num_read.tolist()}")
            # Kernels write where these say.
            expected = budget.num_merges(num_tokens) * budget.chunk_size
            if num_merged.tolist() != [expected]:
                raise ValueError(f"{place}: expected {expected} tokens merged, found {num_merged.tolist()}")
            # Those that were re-positioned count for fewer. Sums of others may leave int64.
            if bool((count < 0).any()) or bool((count.double().sum(-1) > expected).any()):
                raise ValueError(f"{place}: expected counts of {expected} tokens at most, found others")


KINDS[KIND] = Kind(
    upgraded=lambda fields: MemoryConfig.from_dict(fields).to_dict(),
    config=MemoryConfig.from_dict,
    cache=MemoryCache,
    check=_check,
)
