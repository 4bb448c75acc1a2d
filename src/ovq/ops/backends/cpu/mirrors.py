"""The structures that kernels are called with: those of Python are compared with those of compiled code."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import TypeVar

from ovq.ops.backends.cpu.compiler import Unavailable

_Structure = TypeVar("_Structure", bound=ctypes.Structure)

MIRRORS: dict[str, type[ctypes.Structure]] = {}
"""The structures of Python, by the names of those in C++ that they mirror field by field."""


def mirror_of(name: str) -> Callable[[type[_Structure]], type[_Structure]]:
    """Decorates a structure that mirrors one of the kernels (`MIRRORED` of compiler.py)."""

    def register(structure: type[_Structure]) -> type[_Structure]:
        MIRRORS[name] = structure
        return structure

    return register


class _Place(ctypes.Structure):
    """`Place` of the file that compiler.py writes: of a structure or of one of its fields."""

    _fields_ = [("name", ctypes.c_char_p), ("at", ctypes.c_int64), ("size", ctypes.c_int64)]


def check_mirrors(library: ctypes.CDLL) -> None:
    """Raise Unavailable, naming the first difference, unless loaded kernels have the structures of Python.

    A field that is missing or in another place would be read as another one, with any result.
    """
    try:
        table = library.ovq_places
    except AttributeError:
        raise Unavailable("expected kernels that say where their arguments are, found others") from None
    table.restype = ctypes.POINTER(_Place)
    entries = itertools.takewhile(lambda entry: entry.name, (table()[i] for i in itertools.count()))
    found = {entry.name.decode(): (entry.at, entry.size) for entry in entries}
    expected = {}
    for name, structure in MIRRORS.items():
        expected[name] = 0, ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            expected[f"{name}.{field}"] = place.offset, place.size
    for name in (*found, *expected):
        if expected.get(name) != found.get(name):
            raise Unavailable(
                f"expected kernels with {name} {_said(expected.get(name))}, as Python has it, "
                f"found {_said(found.get(name))}"
            )


def _said(place: tuple[int, int] | None) -> str:
    return "nowhere" if place is None else f"at byte {place[0]} of {place[1]} bytes"
