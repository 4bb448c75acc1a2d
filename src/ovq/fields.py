"""Fields of configs: type checks, fields declared by mixers, fields saved by earlier versions, and the
correction of misspelt names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST_SEED = 2**32 - 1
"""Largest seed of NumPy's global generator, which transformers seeds too."""

RENAMED = {"slot_bias": "bias", "slot_rate": "rate"}
"""Earlier names of config fields in saved files, and their current names."""

REMOVED = {"window": 0, "ovq_sinks": 0, "exact_rope_dim": 0, "slot_temperature": False}
"""Removed config fields that saved files may contain, and the values that had no effect."""

SAVED_WITH_ALL = {
    *("num_sinks", "sink_window", "delta_value_dim", "kda_value_dim", "mamba_head_dim", "mamba_state_size"),
    *("vq_decay", "commitment_weight", "mesa_steps"),
    *("kvm_chunk_size", "kvm_window_chunks", "kvm_growth", "kvm_sinks", "kvm_rope_dim", "kvm_norm_leak"),
    *("raven_slots", "raven_top_k", "raven_head_dim", "raven_noise"),
}
"""Fields of mixers that every config was saved with until version 0.2, even without such a mixer."""

_LARGEST = 2**63 - 1
"""Largest int64."""


@dataclasses.dataclass(frozen=True)
class ConfigField:
    """A config field declared by a mixer in `Mixer.config_fields`, for configs of models with that mixer.

    Attributes:
        kind: Type: `int`, `float`, `bool`, `str`, a list or a union of these, also with None.
        default: Default value.
        doc: Description in one line.
        name: Name in the config; `None` for the name of the mixer's argument.
        at_least: Minimum value; `None` for no bound.

    Raises:
        ValueError: If the default is invalid.

    Example:
        >>> size = ConfigField(int, 4, "how many there are", at_least=1)
        >>> size.check("my_size", 0)
        Traceback (most recent call last):
        ValueError: my_size: expected at least 1, found 0
    """

    kind: Any
    default: Any
    doc: str
    _: dataclasses.KW_ONLY
    name: str | None = None
    at_least: int | None = None

    def __post_init__(self) -> None:
        """Check the default."""
        self.check(self.name or "default", self.default)

    def accepts(self, value: Any) -> bool:
        """Whether a value has the field's type."""
        return _fits(value, self.kind)

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError, naming the field, if a value is invalid."""
        if not self.accepts(value):
            raise ValueError(f"{name}: expected {_described(self.kind)}, found {value!r}")
        if self.at_least is not None and value is not None and value < self.at_least:
            raise ValueError(f"{name}: expected at least {self.at_least}, found {value}")


@functools.cache
def field_types(section: type[DataclassInstance]) -> dict[str, Any]:
    """Types of a dataclass's fields by name."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def check_fields(section: DataclassInstance, *, prefix: str = "") -> None:
    """Raise ValueError for the first field of a dataclass with a value of the wrong type. Call it first in
    `__post_init__`, so that later range checks see comparable numbers.

    NaN and Inf are refused, and a bool is not an integer. An integer is accepted for a float, as in JSON, and
    converted, even if the dataclass is frozen.
    """
    for name, kind in field_types(type(section)).items():
        value = getattr(section, name)
        if not _fits(value, kind):
            is_large = isinstance(value, int) and abs(value) > _LARGEST
            found = f"{value!r}, which is too large" if is_large else repr(value)
            raise ValueError(f"{prefix}{name}: expected {_described(kind)}, found {found}")
        if float in (kind, *typing.get_args(kind)) and isinstance(value, int):
            object.__setattr__(section, name, float(value))


def check_at_least(least: int, section: Any, *names: str, prefix: str = "") -> None:
    """Raise ValueError for the first of these attributes of `section` that is set and below `least`."""
    for name in names:
        if (found := getattr(section, name)) is not None and found < least:
            raise ValueError(f"{prefix}{name}: expected at least {least}, found {found}")


def with_new_names(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a saved config under their current names, without those of `REMOVED`.

    Raises:
        ValueError: If a field is present under both names, or a removed field has a value that had an effect.
    """
    for name, unused in REMOVED.items():
        if (found := fields.get(name)) not in (None, unused):
            raise ValueError(f"{name} was removed; expected {unused}, found {found!r}")
    if both := [old for old, new in RENAMED.items() if old in fields and new in fields]:
        raise ValueError(f"expected {RENAMED[both[0]]} alone, found {both[0]}, its old name, beside it")
    return {RENAMED.get(name, name): value for name, value in fields.items() if name not in REMOVED}


def did_you_mean(found: str, names: Iterable[str]) -> str:
    """End of an error message about an unknown name: the closest known name, if any.

    Example:
        >>> did_you_mean("recal-ovq", ["recall-ovq", "recall-full"])
        "; did you mean 'recall-ovq'?"
        >>> did_you_mean("mine", ["recall-ovq", "recall-full"])
        ''
    """
    close = difflib.get_close_matches(found.lower(), list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float: not NaN, infinite, or an integer too large for a float.

    Example:
        >>> is_finite(0.5), is_finite(float("nan")), is_finite(10**400)
        (True, False, False)
    """
    # `math.isfinite` would break graphs of torch.compile in which the number is symbolic.
    return -sys.float_info.max <= value <= sys.float_info.max


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type declared by a dataclass."""
    if typing.get_origin(kind) is types.UnionType:
        return any(_fits(value, part) for part in typing.get_args(kind))
    if (origin := typing.get_origin(kind)) in (tuple, list):
        return isinstance(value, origin) and all(_fits(part, typing.get_args(kind)[0]) for part in value)
    if isinstance(value, bool):
        return kind is bool
    if kind is int:
        return isinstance(value, int) and abs(value) <= _LARGEST
    if kind is float:
        return isinstance(value, (int, float)) and is_finite(value)
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    """A type in words."""
    if typing.get_origin(kind) is types.UnionType:
        return " or ".join(map(_described, typing.get_args(kind)))
    if (origin := typing.get_origin(kind)) in (tuple, list):
        return f"a {origin.__name__}, each part {_described(typing.get_args(kind)[0])}"
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "a text"}
    return words.get(kind, "none")
