"""Digests of configurations, which depend exactly on the fields that affect the outcome."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from ovq.fields import RENAMED

# These change the files of a run, not its outcome.
WITHOUT_EFFECT = frozenset({"log_every", "eval_every", "save_every"})
"""Fields of a training run that digests leave out."""

_FIRST_NAMES = {new: old for old, new in RENAMED.items()}
_LENGTH = 10


def described(section: Any) -> dict[str, Any]:
    """Class name and non-default fields of a dataclass, recursively."""
    fields = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if field.name not in WITHOUT_EFFECT and value != field.default:
            # Under its original name, on which the names of existing run folders depend.
            name = _FIRST_NAMES.get(field.name, field.name)
            fields[name] = described(value) if dataclasses.is_dataclass(value) else value
    return {"class": type(section).__name__, "fields": fields}


def digest(content: dict[str, Any]) -> str:
    """A short hexadecimal digest of JSON content.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
        True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]
