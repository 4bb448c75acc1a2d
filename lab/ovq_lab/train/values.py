"""Parsing of field values from strings of a command line or of a recipe file."""

from __future__ import annotations

import contextlib
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ovq.fields import ConfigField, did_you_mean, field_types

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def type_of_field(
    section: type[DataclassInstance], name: str, where: str, others: Mapping[str, ConfigField] | None = None
) -> Any:
    """The type of a field of a section or of `others`; the error message begins with `where`."""
    of_others = {name: field.kind for name, field in (others or {}).items()}
    types_of_fields = of_others | field_types(section)
    if name not in types_of_fields:
        raise ValueError(
            f"{where}: expected one of the fields {', '.join(sorted(types_of_fields))}, "
            f"found {name!r}{did_you_mean(name, types_of_fields)}"
        )
    return types_of_fields[name]


def parse_value(text: str, kind: Any, where: str) -> Any:
    """Parse a string as the type of a field; error messages begin with `where`.

    Example:
        >>> parse_value("64, 128", tuple[int, ...], "--set train.lengths")
        (64, 128)
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return _parse_union(text, arguments, where)
    if origin in (tuple, list):
        return origin(
            parse_value(part.strip(), arguments[0], where) for part in text.split(",") if part.strip()
        )
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{where}: expected true or false, found {text!r}")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{where}: expected {kind.__name__}, found {text!r}") from None


def _parse_union(text: str, kinds: tuple[Any, ...], where: str) -> Any:
    """Parse a string as the first of several types that fits."""
    if type(None) in kinds and text.lower() == "none":
        return None
    *others, last = (kind for kind in kinds if kind is not type(None))
    for kind in others:
        with contextlib.suppress(ValueError):
            return parse_value(text, kind, where)
    return parse_value(text, last, where)
