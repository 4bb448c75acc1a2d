"""Tasks and mixers of others, by name: from a module that the user imports, or an installed package. What the
laboratory has, `ovq_lab`.

A name that a file gives (the config of a model, the configuration of a run) imports nothing by itself. It
finds what has been registered, and what installed packages offer as entry points.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ovq.fields import did_you_mean

T = TypeVar("T")

#: What the laboratory has, by kind and name. The library imports it in no other way than by this table and
#: `from_laboratory`, so that it works where the laboratory is not installed.
LABORATORY = {
    "command": {
        "demo": "ovq_lab.cli.demo:demo",
        "train": "ovq_lab.cli.train:train",
        "eval": "ovq_lab.cli.evaluate:app",
        "publish": "ovq_lab.cli.publish:publish",
        "bench": "ovq_lab.cli.bench:bench",
        "reproduce": "ovq_lab.cli.reproduce:reproduce",
    },
    "mixer": {
        "vq": "ovq_lab.mixers:VQAttention",
        "kvm": "ovq_lab.mixers:KVMAttention",
        "raven": "ovq_lab.mixers:RavenAttention",
        "linear_attention": "ovq_lab.mixers:LinearAttention",
        "fox": "ovq_lab.mixers:ForgettingAttention",
        "kda": "ovq_lab.mixers:KimiDeltaAttention",
        "mesanet": "ovq_lab.mixers:MesaNet",
    },
}


class MissingLaboratory(ModuleNotFoundError, ValueError):
    """The laboratory is not installed. Also a ValueError, so that a command reports it in one line."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}: expected the package ovq-lab, the laboratory, found none; from a checkout: "
            "pip install ./lab"
        )


def has_laboratory() -> bool:
    """Whether the laboratory can be imported."""
    return importlib.util.find_spec("ovq_lab") is not None


def from_laboratory(path: str, *, what: str) -> Any:
    """What `module:name` is in the laboratory.

    Args:
        path: The module and the name.
        what: What needs it, for the error.

    Raises:
        MissingLaboratory: If the laboratory is not installed.
    """
    if not has_laboratory():
        raise MissingLaboratory(what)
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def register(known: dict[str, type[T]], name: str, cls: Any, *, base: type, what: str) -> None:
    """Add a class to those that can be named.

    Args:
        known: The classes by name; changed.
        name: Its name in configurations: letters, digits and underscores.
        cls: The class.
        base: What it must inherit.
        what: What it is called in errors, such as `"mixer"`.

    Raises:
        ValueError: If the name is no identifier or belongs to another class, or the class does not inherit
            `base`.

    Example:
        >>> known: dict[str, type[Exception]] = {}
        >>> register(known, "key", KeyError, base=Exception, what="error")
        >>> known
        {'key': <class 'KeyError'>}
    """
    is_one = isinstance(cls, type) and issubclass(cls, base)
    if not is_one:
        raise ValueError(f"{what} {name!r}: expected a class that inherits {base.__name__}, found {cls!r}")
    if not name.isidentifier():
        raise ValueError(f"{what} {name!r}: expected a name of letters, digits and underscores")
    if known.get(name, cls) is not cls:
        raise ValueError(f"{what} {name!r}: expected a name that is free, found {known[name].__qualname__}")
    if name in LABORATORY.get(what, {}) and not cls.__module__.startswith("ovq_lab."):
        raise ValueError(f"{what} {name!r}: expected a name that is free, found one of the laboratory")
    known[name] = cls


def usable_names(known: Iterable[str], *, what: str) -> list[str]:
    """The names of registered classes, and of those of the laboratory if it is installed.

    Args:
        known: Those that have been registered.
        what: What they are called in errors, such as `"mixer"`.
    """
    return list(dict.fromkeys([*known, *(LABORATORY.get(what, ()) if has_laboratory() else ())]))


def find(known: dict[str, type[T]], name: str, *, base: type, what: str) -> type[T]:
    """A class by its name: a registered one, one of the laboratory, or one that an installed package offers.

    Args:
        known: The registered classes by name. What others offer is added once it is asked for.
        name: The name.
        base: What it must inherit.
        what: What it is called in errors; the group of entry points is `ovq.WHATs`, such as `ovq.mixers`.

    Raises:
        ValueError: If there is none of the name, or it cannot be imported, or is no such class.

    Example:
        >>> find({"key": KeyError}, "key", base=Exception, what="error")
        <class 'KeyError'>
    """
    of_laboratory = LABORATORY.get(what, {})
    if name not in known and name in of_laboratory:
        found = from_laboratory(of_laboratory[name], what=f"{what} {name!r}")
        register(known, name, found, base=base, what=what)
    if name not in known:
        for entry in entry_points(group=f"ovq.{what}s"):
            if entry.name == name:
                register(known, name, _loaded(entry.load, entry.value), base=base, what=what)
                break
        else:
            names = sorted({*known, *of_laboratory})
            raise ValueError(
                f"expected a {what} among {', '.join(names)}, found {name!r}{did_you_mean(name, names)}"
            )
    return known[name]


def import_module(name: str) -> Any:
    """Import a module of the user's, from the current folder too, as `python -m` does.

    Raises:
        ValueError: If it cannot be imported.

    Example:
        >>> import_module("math").__name__
        'math'
    """
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    return _loaded(lambda: importlib.import_module(name), name)


def _loaded(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what}: expected what can be imported, found {error}") from error
