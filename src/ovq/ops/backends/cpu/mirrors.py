"""ctypes structures of the kernels' arguments, with fields read from the C++ headers.

ctypes computes their layout by itself, so it is compared with that of the compiled code on loading.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

from torch import Tensor

from ovq.ops.backends.cpu import compiler
from ovq.ops.backends.cpu.compiler import Unavailable

_KINDS: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "*": ctypes.c_void_p}


class Mirror(ctypes.Structure):
    """A ctypes structure that mirrors a structure in C++."""

    def point(self, **tensors: Tensor | None) -> None:
        """Let fields point to contiguous tensors, which are kept alive; None leaves a field as it is."""
        for name, x in tensors.items():
            if x is not None:
                assert x.is_contiguous(), name
                setattr(self, name, self.place(x))

    def place(self, x: Tensor) -> int:
        """The address of a tensor's data; the tensor is kept alive as long as this structure."""
        self.__dict__.setdefault("kept", []).append(x)
        return x.data_ptr()


MIRRORS: dict[str, Any] = {}
"""The `Mirror` of each structure in `MIRRORED` of compiler.py."""
for _name in compiler.MIRRORED:
    _fields = []
    for _field, _kind, _length in compiler.fields_of(_name):
        _type = _KINDS.get(_kind) or MIRRORS[_kind]
        _fields.append((_field, _type * _length if _length else _type))
    MIRRORS[_name] = type(_name, (Mirror,), {"_fields_": _fields})


class _Place(ctypes.Structure):
    """`Place` of the file that compiler.py writes: offset and size of a structure or a field."""

    _fields_ = [("name", ctypes.c_char_p), ("at", ctypes.c_int64), ("size", ctypes.c_int64)]


def check_mirrors(library: ctypes.CDLL) -> None:
    """Raise Unavailable, naming the first difference, unless loaded kernels have the layouts of Python.

    A field that is missing or at another offset would be read as another one, with arbitrary results.
    """
    try:
        table = library.ovq_places
    except AttributeError:
        raise Unavailable("expected kernels with a table of their argument layouts, found none") from None
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
                f"expected kernels with {name} {_described(expected.get(name))}, as Python has it, "
                f"found {_described(found.get(name))}"
            )


def _described(place: tuple[int, int] | None) -> str:
    return "missing" if place is None else f"at byte {place[0]} of {place[1]} bytes"
