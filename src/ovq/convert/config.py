"""`MemoryConfig`: sizes and settings of the memory of each key/value head of a converted model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.reach import Reach
from ovq.fields import is_finite
from ovq.ops.narrow import STATE_DTYPES
from ovq.ops.options import (
    CURRENT_MERGES,
    Options,
    check_sizes,
    check_value_weight,
    current_merge,
    default_growth,
)
from ovq.ops.schedule import grown_slots, tokens_merged

#: Field of a model's config in which a `MemoryConfig` is saved.
CONFIG_KEY = "ovq_memory"

#: Smallest `trained_length`.
LEAST_LENGTH = 32

# Power of the masses in the rank of edges: weights of expected use carry more information than counts.
MASS_POWER = 1.0

# The elements of a tensor, also of one that a file only claims to have, can then be counted in int64.
_MOST_ROWS = 2**31 - 1
# By field: how deep its numbers are nested in lists, and the least and largest integer; None for any finite
# numbers. Multiplying keys by powers of 2 does not round as long as float16 can hold them.
_NUMBERS: dict[str, tuple[int, tuple[int, int] | None]] = {
    "chunk_size": (0, (1, _MOST_ROWS)),
    "num_sinks": (0, (0, _MOST_ROWS)),
    "num_slots": (2, (0, _MOST_ROWS)),
    "window": (2, (1, _MOST_ROWS)),
    "key_exponents": (3, (-8, 8)),
    "token_use": (3, None),
    "slot_temperature": (2, None),
    "slot_bias": (2, None),
    "trained_length": (0, (LEAST_LENGTH, 2**62)),
    "max_distance": (0, (LEAST_LENGTH // 4, 2**62)),
    "rotary_frequencies": (1, None),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Sizes and settings of a converted model's memory, for every layer and key/value head.

    A head keeps `num_sinks + num_slots + window` rows of a key and a value, however long the text is.

    Attributes:
        num_slots: slots per head, `num_slots[layer][head]`; 0 for a head that forgets what leaves its window.
        window: last tokens that a head keeps exactly, including the current one; a multiple of `chunk_size`.
            When the window is full, its oldest `chunk_size` tokens are merged into the slots.
        num_sinks: first tokens of a text that every head keeps exactly.
        chunk_size: tokens merged at a time.
        merge: update rule of the slots, as in `ovq_attention`.
        value_weight: weight of distances between values relative to those between keys, where both have
            a mean squared length of about 1; one number, or `value_weight[layer][head]`.
        state_dtype: format of the slots: `"float32"`, `"bfloat16"`, or `"int8"` with a scale per slot.
        key_exponents: `key_exponents[layer][head][i]`: distances use component i of a head's keys times
            `2 ** exponent`; None for 0. Scores do not depend on it, as queries are divided by the same
            factors.
        token_use: `token_use[layer][head]`, the K + V + 1 coefficients that give tokens their weights in
            merges (`ovq.convert.use`); None for equal weights.
        slot_temperature: per layer and *query* head, factor of the scores of slots with more than one token;
            None for 1, but in models that `ovq adapt` of earlier versions trained.
        slot_bias: per layer and query head, summand of these scores; None for 0.
        trained_length: once a text is longer than this, far sinks and slots are re-positioned, because a
            model does badly at distances that it was not trained on. None for never; `attach` then fills in
            the length in the model's config if it knows the rotary frequencies.
        max_distance: largest distance of re-positioned rows; None for a quarter of `trained_length`.
        rotary_frequencies: rotary angles per position, see `Reach`; `attach` fills them in.

    Raises:
        ValueError: if a number is out of range, or the lists do not fit together.

    Example:
        >>> config = MemoryConfig.uniform(
        ...     num_layers=2, num_kv_heads=3, num_slots=64, window=128, num_sinks=4, chunk_size=32
        ... )
        >>> config.num_slots, config.rows_per_head
        ([[64, 64, 64], [64, 64, 64]], 196.0)
        >>> MemoryConfig.from_dict(config.to_dict()) == config
        True
    """

    num_slots: list[list[int]]
    window: list[list[int]]
    num_sinks: int = 4
    chunk_size: int = 32
    merge: str = "nearest"
    value_weight: float | list[list[float]] = 1.0
    state_dtype: str = "float32"
    key_exponents: list[list[list[int]]] | None = None
    token_use: list[list[list[float]]] | None = None
    slot_temperature: list[list[float]] | None = None
    slot_bias: list[list[float]] | None = None
    trained_length: int | None = None
    max_distance: int | None = None
    rotary_frequencies: list[float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "merge", current_merge(self.merge))
        for name, known in (("merge", CURRENT_MERGES), ("state_dtype", STATE_DTYPES)):
            if (choice := getattr(self, name)) not in known:
                raise ValueError(f"{name}: expected one of {list(known)}, found {choice!r}")
        for name, (depth, bounds) in _NUMBERS.items():
            # Where None is the default, it is allowed.
            if (value := getattr(self, name)) is None and getattr(type(self), name, 0) is None:
                continue
            for number in _flattened(name, value, depth):
                if bounds is not None:
                    check_sizes(bounds[0], **{name: number})
                    if number > bounds[1]:
                        raise ValueError(f"{name}: expected integers up to {bounds[1]}, found {number}")
                elif not isinstance(number, (int, float)) or not is_finite(number):
                    raise ValueError(f"{name}: expected finite numbers, found {number!r}")
        heads = list(map(len, self.num_slots))
        if not heads or 0 in heads or heads != list(map(len, self.window)):
            raise ValueError(
                "expected num_slots and window for the same layers and heads, found "
                f"{heads} and {list(map(len, self.window))} heads per layer"
            )
        for name in ("value_weight", "key_exponents", "token_use"):
            if isinstance(table := getattr(self, name), Sequence):
                check_heads(name, table, heads)
        for name in ("slot_temperature", "slot_bias"):
            if (lists := getattr(self, name)) is None:
                continue
            found = list(map(len, lists))
            if len(found) != len(heads) or any(n == 0 or n % h for n, h in zip(found, heads, strict=True)):
                raise ValueError(
                    f"{name}: expected numbers for the query heads of layers with {heads} key/value "
                    f"heads, found {found}"
                )
        for number in itertools.chain(*self.window):
            if number % self.chunk_size:
                raise ValueError(
                    f"window: expected a multiple of chunk_size ({self.chunk_size}), found {number}"
                )
        weight = self.value_weight
        for number in _flattened("value_weight", weight, 2 if isinstance(weight, list) else 0):
            check_value_weight("value_weight", number)

    @classmethod
    def uniform(
        cls, *, num_layers: int, num_kv_heads: int, num_slots: int, window: int, **fields: Any
    ) -> MemoryConfig:
        """A config with the same sizes for every head; `fields` are the other attributes."""
        slots, windows = ([[num] * num_kv_heads for _ in range(num_layers)] for num in (num_slots, window))
        return cls(num_slots=slots, window=windows, **fields)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> MemoryConfig:
        """The config from the output of `to_dict`.

        Raises:
            ValueError: if a field is unknown, missing or out of range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not {"num_slots", "window"} <= set(fields) <= names:
            raise ValueError(
                f"{CONFIG_KEY}: expected num_slots, window and any of {sorted(names)}, found {fields!r:.200}"
            )
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON types."""
        return dataclasses.asdict(self)

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.num_slots)

    @property
    def rows_per_head(self) -> float:
        """Rows of a key and a value that a head keeps, on average over all heads."""
        num_heads = sum(map(len, self.num_slots))
        return (self.num_sinks * num_heads + sum(map(sum, self.num_slots + self.window))) / num_heads

    @property
    def reach(self) -> Reach | None:
        """When and how far rows are re-positioned; None for never, or if the frequencies are not known."""
        if self.trained_length is None or self.rotary_frequencies is None:
            return None
        distance = self.trained_length // 4 if self.max_distance is None else self.max_distance
        return Reach(
            trained_length=self.trained_length,
            max_distance=distance,
            frequencies=tuple(self.rotary_frequencies),
        )

    def layer(self, index: int) -> LayerConfig:
        """The config of one layer."""
        slots, windows, given = self.num_slots[index], self.window[index], self.value_weight
        weights = given[index] if isinstance(given, list) else [given] * len(slots)
        groups: dict[tuple[int, int, float], list[int]] = {}
        for head, (num, window, weight) in enumerate(zip(slots, windows, weights, strict=True)):
            # Without slots there are no distances, so the weight does not matter.
            groups.setdefault((num, window, weight if num else 1.0), []).append(head)
        of_all = {n: getattr(self, n) for n in ("num_sinks", "chunk_size", "merge", "state_dtype")}
        return LayerConfig(
            budgets=tuple(
                Budget(heads=tuple(heads), num_slots=num, window=window, value_weight=weight, **of_all)
                for (num, window, weight), heads in groups.items()
            ),
            num_kv_heads=len(slots),
            reach=self.reach,
            **{
                name: None if (table := getattr(self, name)) is None else table[index]
                for name in ("key_exponents", "token_use", "slot_temperature", "slot_bias")
            },
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """Sizes and settings that some key/value heads of a layer have in common.

    Attributes:
        heads: indices of the key/value heads.
        num_slots, window, num_sinks, chunk_size, merge, value_weight, state_dtype: as in `MemoryConfig`, per
            head.
    """

    heads: tuple[int, ...]
    num_slots: int
    window: int
    num_sinks: int
    chunk_size: int
    merge: str
    value_weight: float
    state_dtype: str = "float32"

    @property
    def num_exact(self) -> int:
        """Number of rows for sinks and window."""
        return self.num_sinks + self.window

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of states, by the names that `OVQState` has."""
        return {name: getattr(self, name) for name in ("num_slots", "chunk_size", "num_sinks", "window")}

    def num_merged(self, num_read: int) -> int:
        """Number of tokens merged once `num_read` were read."""
        return tokens_merged(
            num_read, chunk_size=self.chunk_size, num_sinks=self.num_sinks, window=self.window
        )

    def num_open(self, num_merged: int) -> int:
        """Number of slots in use after `num_merged` merged tokens."""
        if not self.num_slots or not num_merged:
            return 0
        growth = self.options.growth
        return grown_slots(0, num_merged, num_slots=self.num_slots, chunk_size=num_merged, growth=growth)

    @functools.cached_property
    def options(self) -> Options:
        """Options of the dictionary; there must be slots."""
        return Options(
            num_slots=self.num_slots,
            chunk_size=self.chunk_size,
            growth=default_growth(self.merge),
            init="novelty",
            merge=self.merge,
            seed=0,
            value_weight=self.value_weight,
            mass_power=MASS_POWER,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Sizes and settings of one layer.

    Attributes:
        budgets: key/value heads grouped by equal sizes and settings.
        key_exponents, token_use, slot_temperature, slot_bias: those of `MemoryConfig` for this layer.
        reach: when and how far rows are re-positioned; None for never.
    """

    budgets: tuple[Budget, ...]
    num_kv_heads: int
    key_exponents: Sequence[Sequence[int]] | None = None
    token_use: Sequence[Sequence[float]] | None = None
    slot_temperature: Sequence[float] | None = None
    slot_bias: Sequence[float] | None = None
    reach: Reach | None = None

    def tensor(self, name: str, device: torch.device | str) -> Tensor | None:
        """The numbers of a field, in float32."""
        numbers = getattr(self, name)
        return None if numbers is None else torch.tensor(numbers, dtype=torch.float32, device=device)

    def key_factors(self, like: Tensor) -> Tensor | None:
        """Factors `2 ** exponent` `[Hkv, 1, K]` of keys, in dtype and on device of `like`; None for 1."""
        exponents = self.tensor("key_exponents", like.device)
        return None if exponents is None else torch.exp2(exponents)[:, None].to(like.dtype)

    def misfits(self, num_heads: int | None, key_dim: int, value_dim: int) -> Iterator[str]:
        """Error messages for the fields whose lengths do not fit the model's heads.

        Args:
            num_heads: number of query heads; None for a call without queries.
            key_dim: components of a key. value_dim: of a value.
        """
        for name, expected in (("key_exponents", key_dim), ("token_use", key_dim + value_dim + 1)):
            if (sizes := {*map(len, getattr(self, name) or [])}) - {expected}:
                yield f"{name}: expected {expected} numbers per head, found {sorted(sizes)}"
        for name in ("slot_temperature", "slot_bias"):
            found = num_heads if (numbers := getattr(self, name)) is None else len(numbers)
            if num_heads not in (None, found):
                yield f"{name}: expected {num_heads} numbers per layer, one per query head, found {found}"
        if self.reach is not None and (num := len(self.reach.frequencies)) > key_dim // 2:
            yield f"rotary_frequencies: expected at most {key_dim // 2} for keys of {key_dim}, found {num}"


def check_heads(name: str, table: Sequence[Sequence[Any]], heads: list[int]) -> None:
    """Raise ValueError, naming the argument, unless `table` has one entry per head of each layer."""
    if (found := list(map(len, table))) != heads:
        raise ValueError(f"{name}: expected numbers for {heads} key/value heads per layer, found {found}")


def _flattened(name: str, value: Any, depth: int) -> Iterator[Any]:
    """What lists nested to a depth contain; ValueError, naming the field, for anything else."""
    if depth == 0:
        yield value
    elif not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}: expected {'lists of ' * depth}numbers, found {value!r:.100}")
    else:
        for part in value:
            yield from _flattened(name, part, depth - 1)


def as_table(name: str, value: int | Sequence[Sequence[int]], heads: list[int]) -> list[list[int]]:
    """One number for all heads, or a table, as a table `[layer][head]`.

    Raises:
        ValueError: naming the argument, unless the table has one number per key/value head.
    """
    if isinstance(value, int):
        return [[value] * num for num in heads]
    try:
        table = [list(layer) for layer in value]
    except TypeError:
        raise ValueError(
            f"{name}: expected an integer, or a list of them per layer, found {value!r}"
        ) from None
    check_heads(name, table, heads)
    return table
