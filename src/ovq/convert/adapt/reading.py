"""`SlotReading`: what a conversion adds and an adaptation learns, as parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ovq.convert.cache import MemoryCache
from ovq.convert.config import MemoryConfig

# Digits that are saved, so that a config stays short.
_DIGITS = 5


class SlotReading(nn.Module):
    """How each query head reads slots of several tokens: a factor of their scores, and what is added to them.

    Args:
        config: where it starts.
        num_heads: query heads of a layer.

    Attributes:
        log_temperature: `[layers, num_heads]` logarithms of the factors. bias: `[layers, num_heads]`.

    Raises:
        ValueError: a memory without slots, which has nothing to learn, or a temperature that is not above 0.

    Example:
        >>> sizes = dict(num_layers=2, num_kv_heads=1, num_slots=8, window=16, chunk_size=8)
        >>> reading = SlotReading(MemoryConfig.uniform(**sizes), 2)
        >>> _ = reading.bias.data.fill_(0.5)
        >>> reading.applied(MemoryConfig.uniform(**sizes)).slot_bias
        [[0.5, 0.5], [0.5, 0.5]]
    """

    def __init__(self, config: MemoryConfig, num_heads: int) -> None:
        super().__init__()
        if not any(map(any, config.num_slots)):
            raise ValueError("expected a memory with slots, found windows alone: there is nothing to learn")
        shape = config.num_layers, num_heads
        temperature, bias = (
            fill * torch.ones(shape) if table is None else torch.tensor(table).view(shape)
            for table, fill in ((config.slot_temperature, 1.0), (config.slot_bias, 0.0))
        )
        if not bool((temperature > 0).all()):
            raise ValueError("slot_temperature: expected numbers above 0, found others")
        self.log_temperature = nn.Parameter(temperature.log())
        self.bias = nn.Parameter(bias)

    def of_layer(self, index: int) -> dict[str, Tensor]:
        """`temperature` and `bias` `[num_heads]` of a layer, as `HeadMemory.attend` takes them."""
        return {"temperature": self.log_temperature[index].exp(), "bias": self.bias[index]}

    def put_into(self, cache: MemoryCache) -> None:
        """Let the layers of a cache read by these parameters, so that gradients reach them."""
        for i, layer in enumerate(cache.layers):
            found: dict[str, Any] = {f"slot_{name}": x for name, x in self.of_layer(i).items()}
            layer.config = dataclasses.replace(layer.config, **found)

    def applied(self, config: MemoryConfig) -> MemoryConfig:
        """The config with what was learned."""

        def table(x: Tensor) -> list[list[float]]:
            return [[round(number, _DIGITS) for number in layer] for layer in x.tolist()]

        return dataclasses.replace(
            config, slot_temperature=table(self.log_temperature.exp()), slot_bias=table(self.bias)
        )
