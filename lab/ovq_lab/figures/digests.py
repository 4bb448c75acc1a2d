"""Short names for configurations: equal where what comes out is equal, different where it differs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from ovq.fields import RENAMED

# These change what is kept of a run, not what comes out of it.
WITHOUT_EFFECT = frozenset({"log_every", "eval_every", "save_every"})
"""Fields of a training run that no name depends on."""

_FIRST_NAMES = {new: old for old, new in RENAMED.items()}
_LENGTH = 10


def described(section: Any) -> dict[str, Any]:
    """The name and the fields of a dataclass that are not at their defaults, dataclasses within it, too."""
    fields = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name not in WITHOUT_EFFECT and value != field.default:
            # By the name it was first saved under, which the folders of runs are called after.
            name = _FIRST_NAMES.get(field.name, field.name)
            fields[name] = described(value) if dataclasses.is_dataclass(value) else value
    return {"class": type(section).__name__, "fields": fields}


def digest(content: dict[str, Any]) -> str:
    """A few hexadecimal digits that tell this content from others.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
        True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]
