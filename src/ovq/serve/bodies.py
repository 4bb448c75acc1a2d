"""Parsing of request bodies: strict JSON types, and errors in the form "expected ..., found ...".

An unsupported field is refused unless its value has no effect. An unknown field is refused too, as it may be
misspelt.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError
from pydantic_core import from_json, to_json

from ovq.serve.errors import APIError, bad_field, bad_request, shown

# How pydantic says bounds of numbers and patterns of text, and how this library does.
_BOUNDS = {
    "String should match pattern": "text that matches",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "greater than": "more than",
}

AnyRequest = TypeVar("AnyRequest", bound="Request")
Item = TypeVar("Item")


class _FirstError(FailFast):
    """pydantic's, which has no hash, as unions of types need."""

    __hash__ = object.__hash__


ListOf = Annotated[list[Item], _FirstError()]
"""A list with one error for its first wrong item: of a million errors each would take a kilobyte."""


class Request(BaseModel):
    """Base class of all requests: strict JSON types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)

    #: OpenAI's fields that are not supported, with the values that have no effect.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    #: Fields that are lists of objects with unsupported fields of their own.
    parts: ClassVar[dict[str, type[Request]]] = {}


def parsed(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """Parse the body of a request.

    Raises:
        APIError: If the body is not JSON, or a field is missing, unknown, not supported or out of range.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"expected a body of JSON, found otherwise ({error})") from error
    if not isinstance(fields, dict):
        raise bad_request(f"expected a JSON object, found {type(fields).__name__}")
    _drop_neutral(kind, fields, "")
    for name, field in kind.model_fields.items():
        # As in OpenAI's API, null stands for the default.
        if not field.is_required() and fields.get(name, "") is None:
            del fields[name]
    for name, part in kind.parts.items():
        if isinstance(values := fields.get(name), list):
            for place, value in enumerate(values):
                if isinstance(value, dict):
                    _drop_neutral(part, value, f"{name}.{place}.")
    try:
        # From JSON again, because strict mode accepts objects for models only there.
        return kind.model_validate_json(to_json(fields))
    except ValidationError as error:
        raise _refusal(error, kind) from error


def _drop_neutral(kind: type[Request], fields: dict[str, Any], prefix: str) -> None:
    """Remove unsupported fields whose values have no effect; refuse the others."""
    for name in kind.unsupported.keys() & fields.keys():
        value, neutral = fields.pop(name), kind.unsupported[name]
        # False == 0 == 0.0 in Python, which is welcome, as JSON writers may mix them up.
        if value not in neutral:
            message = f"expected {neutral[-1]!r}, as nothing else is supported, found {shown(value)}"
            raise bad_field(f"{prefix}{name}", message, code="unsupported_parameter")


def _refusal(error: ValidationError, kind: type[Request]) -> APIError:
    """The first validation error, in the form "expected ..., found ..."."""
    first = error.errors(include_url=False)[0]
    param = str(first["loc"][0]) if first["loc"] else ""
    # For a union, pydantic lists the errors of each alternative; the field's description is clearer.
    fields, depth = kind.model_fields, 1
    if param in kind.parts and len(first["loc"]) > 2:
        fields, depth = kind.parts[param].model_fields, 3
    name = str(first["loc"][depth - 1]) if first["loc"] else ""
    description = fields[name].description if name in fields else None
    is_union = description is not None and len(first["loc"]) > depth
    place = ".".join(map(str, first["loc"][:depth] if is_union else first["loc"]))
    if first["type"] == "extra_forbidden":
        return bad_field(place, "expected fields of this request, found an unknown one")
    if first["type"] == "missing":
        return bad_field(place, "expected this field, found none")
    if is_union:
        return bad_field(place, f"expected {description}, found something else")
    message = first["msg"].removeprefix("Input should be ").removeprefix("List should have ")
    message = message.partition(" after validation")[0]
    for pydantic, ours in _BOUNDS.items():
        message = message.replace(pydantic, ours)
    return bad_field(place, f"expected {message}, found {shown(first['input'])}")
