"""Contexts by name: documents that the model has read, from which any number of requests can continue."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

from ovq.hf.context import Context
from ovq.serve.errors import APIError, bad_field, shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Pattern of context names. They are only used as dictionary keys, never in paths."""

NAME_RULE = "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
"""The same in words, for errors."""


class Contexts:
    """The contexts of a server, counting those being made. Only the thread of its event loop uses them.

    Example:
        >>> contexts = Contexts(max_contexts=2)
        >>> with contexts.reserved("book"), contexts.reserved("book"):
        ...     pass
        Traceback (most recent call last):
        ovq.serve.errors.APIError: context 'book': expected a new name, found one that is taken
    """

    def __init__(self, *, max_contexts: int) -> None:
        self._max_contexts = max_contexts
        # Contexts with their creation times, in seconds since 1970.
        self._entries: dict[str, tuple[Context, int]] = {}
        self._reserved: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Total bytes of all contexts."""
        return sum(context.nbytes for context, _ in list(self._entries.values()))

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)

    def get(self, name: str) -> Context:
        """The context with this name; APIError if there is none."""
        if name not in self._entries:
            raise APIError(
                404,
                f"context: expected one of {self.names}, found {shown(name)}",
                param="context",
                code="context_not_found",
            )
        return self._entries[name][0]

    def remove(self, name: str) -> Context:
        """Remove and return a context, as `get`; running answers that use it are not affected."""
        context = self.get(name)
        del self._entries[name]
        return context

    @contextlib.contextmanager
    def reserved(self, name: str) -> Iterator[None]:
        """Context manager that reserves a name for a context being made.

        APIError if the name cannot be used, or there are too many contexts.
        """
        if NAME.fullmatch(name) is None:
            raise bad_field("name", f"expected {NAME_RULE}, found {shown(name)}")
        if name in self._entries or name in self._reserved:
            raise APIError(
                409,
                f"context {name!r}: expected a new name, found one that is taken",
                param="name",
                code="context_exists",
            )
        if len(self._entries) + len(self._reserved) >= self._max_contexts:
            raise APIError(
                409,
                f"expected at most {self._max_contexts} contexts, found one more: delete one first",
                code="too_many_contexts",
            )
        self._reserved.add(name)
        try:
            yield
        finally:
            self._reserved.discard(name)

    def add(self, name: str, context: Context) -> None:
        """Store a context under a reserved name."""
        self._entries[name] = context, int(time.time())

    def about(self, name: str) -> dict[str, Any]:
        """The object of the API that describes a context, as `get`."""
        context = self.get(name)
        return {
            "id": name,
            "object": "context",
            "created": self._entries[name][1],
            "num_tokens": context.num_tokens,
            "bytes": context.nbytes,
        }
