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
        for name, filled in tensors.items():
            if name.endswith(".filled"):
                num_read = filled + tensors[name.replace("filled", "num_merged")]
                if num_read.tolist() != [num_tokens]:
                    raise ValueError(f"{place}: expected {num_tokens} tokens read, found {num_read.tolist()}")


KINDS[KIND] = Kind(
    upgraded=lambda fields: MemoryConfig.from_dict(fields).to_dict(),
    config=MemoryConfig.from_dict,
    cache=MemoryCache,
    check=_check,
)
