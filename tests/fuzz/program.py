"""What the programs of the fuzzer have in common: how they are written down, and made smaller."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from random import Random
from typing import Any, ClassVar

from tests.fuzz.backends import Backend


class Impossible(Exception):
    """A program whose fields do not fit each other, as `smaller` may make them; `draw` makes none."""


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Program:
    """A random program: every field has a default, the simplest value there is.

    Attributes:
        seed: of the numbers in its tensors.
    """

    #: Name on the command line and in reports.
    kind: ClassVar[str]

    seed: int = 0

    @classmethod
    def draw(cls, rng: Random, backend: Backend) -> Program:
        """A program for `backend`; all its randomness is that of `rng`."""
        raise NotImplementedError

    def check(self, name: str) -> None:
        """Run on the backend `name`; raises, an AssertionError or another error, where something is wrong."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """What makes it again: the fields that are not as simple as can be."""
        parts = (f"{name}={value!r}" for name, value, default in self._fields() if value != default)
        return f"{type(self).__name__}({', '.join(parts)})"

    def lines(self, backend: str) -> str:
        """Python that runs this program alone."""
        name = type(self).__name__
        return f"from {type(self).__module__} import {name}\n{self!r}.check({backend!r})"

    def smaller(self) -> Iterator[Program]:
        """Programs that are a step simpler than this one."""
        for name, value, default in self._fields():
            for simpler in _simpler(value, default):
                yield dataclasses.replace(self, **{name: simpler})

    def _fields(self) -> Iterator[tuple[str, Any, Any]]:
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name), field.default


def _simpler(value: Any, default: Any = None) -> Iterator[Any]:
    """Values simpler than `value`, the simplest first."""
    if value == default:
        return
    if default is not None:
        yield default
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        yield from dict.fromkeys((0, value // 2, value - 1))
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield value[:i] + value[i + 1 :]
            for simpler in _simpler(item):
                yield (*value[:i], simpler, *value[i + 1 :])


def failure(program: Program, backend: str) -> str | None:
    """The error that `program` ends with, in a line; None if it ends well."""
    try:
        program.check(backend)
    except Impossible:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def sort_of(message: str | None) -> str | None:
    """What errors that are alike have in common: all but the numbers.

    Example:
        >>> sort_of("outputs of row 2: expected an error of 1e-12, found [3, 4]")
        'outputs of row #: expected an error of #, found #'
    """
    return None if message is None else re.sub(r"[-+]?\d[-+.\d]*(e[-+]?\d+)?|\[.*\]|\(.*\)", "#", message)


def shrunk(program: Program, backend: str, *, tries: int = 300) -> Program:
    """The simplest program found that fails on `backend` as `program` does."""
    wanted = sort_of(failure(program, backend))
    is_simplest = False
    while not is_simplest:
        is_simplest = True
        for candidate in program.smaller():
            if not tries:
                return program
            tries -= 1
            with contextlib.suppress(Impossible):
                if sort_of(failure(candidate, backend)) == wanted:
                    program, is_simplest = candidate, False
                    break
    return program
