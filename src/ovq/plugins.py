"""Plugins by name: tasks and mixers of user modules, of installed packages, and of the laboratory, `ovq_lab`.

A name in a file (the config of a model, the configuration of a run) imports no arbitrary module. It selects
among registered classes and the entry points of installed packages. The functions here take the kind of such
classes as `what`, such as `"mixer"`.
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

#: Contents of the laboratory by kind and name. The library imports them only through this table and
#: `from_laboratory`, so that it works without the laboratory.
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
    """Error: the laboratory is not installed. Also a ValueError, so that commands report it in one line."""

    def __init__(self, what: str):
        super().__init__(
            f"{what}: expected the package ovq-lab, the laboratory, found none; from a checkout: "
            "pip install ./lab"
        )


def has_laboratory() -> bool:
    """Whether the laboratory is installed."""
    return importlib.util.find_spec("ovq_lab") is not None


def from_laboratory(path: str, *, what: str) -> Any:
    """The object `module:name` of the laboratory; without one, the error says `what` needs it."""
    if not has_laboratory():
        raise MissingLaboratory(what)
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def register(known: dict[str, type[T]], name: str, cls: Any, *, base: type, what: str) -> None:
    """Register a class under a name for configurations, in place among the `known` ones of a kind.

    Raises:
        ValueError: If the name is not an identifier or belongs to another class, or the class does not
            inherit `base`.

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
    """Names of the registered classes of a kind, and of the laboratory's if it is installed."""
    return list(dict.fromkeys([*known, *(LABORATORY.get(what, ()) if has_laboratory() else ())]))


def find(known: dict[str, type[T]], name: str, *, base: type, what: str) -> type[T]:
    """A class by its name: a `known` one, or one of the laboratory or an entry point, which becomes known.

    The group of entry points is `ovq.WHATs`, such as `ovq.mixers`.

    Raises:
        ValueError: If the name is unknown, or the class cannot be imported or does not inherit `base`.

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
                f"expected a {what} among {', '.join(names)}, found {name!r}; one of your own is known once "
                f"its module is imported (--import MODULE){did_you_mean(name, names)}"
            )
    return known[name]


def modules_of_users(classes: Iterable[type]) -> list[str]:
    """Modules to import before names of these classes are known; not ours, and not a running program.

    Example:
        >>> modules_of_users([KeyError, KeyError])
        ['builtins']
    """
    modules = dict.fromkeys(cls.__module__ for cls in classes)
    return [name for name in modules if name.partition(".")[0] not in ("ovq", "ovq_lab", "__main__")]


def import_module(name: str) -> Any:
    """Import a user module, also from the current folder, as `python -m` does; ValueError if that fails.

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
        raise ValueError(f"{what}: expected a module or class that can be imported, found {error}") from error
