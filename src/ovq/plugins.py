"""Tasks and mixers of others, by name: from a module that the user imports, or an installed package.

A name that a file gives (the config of a model, the configuration of a run) imports nothing by itself. It
finds what has been registered, and what installed packages offer as entry points.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, TypeVar

from ovq.fields import did_you_mean

T = TypeVar("T")


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
    known[name] = cls


def find(known: dict[str, type[T]], name: str, *, base: type, what: str) -> type[T]:
    """A class by its name: a registered one, or one that an installed package offers.

    Args:
        known: The registered classes by name. What a package offers is added once it is asked for.
        name: The name.
        base: What it must inherit.
        what: What it is called in errors; the group of entry points is `ovq.WHATs`, such as `ovq.mixers`.

    Raises:
        ValueError: If there is none of the name, or it cannot be imported, or is no such class.

    Example:
        >>> find({"key": KeyError}, "key", base=Exception, what="error")
        <class 'KeyError'>
    """
    if name not in known:
        for entry in entry_points(group=f"ovq.{what}s"):
            if entry.name == name:
                register(known, name, _loaded(entry.load, entry.value), base=base, what=what)
                break
        else:
            names = ", ".join(sorted(known))
            raise ValueError(f"expected a {what} among {names}, found {name!r}{did_you_mean(name, known)}")
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


def import_class(path: str) -> Any:
    """What `module:Class` names, from the current folder too.

    Raises:
        ValueError: If it is not of this form, or cannot be imported.

    Example:
        >>> import_class("collections:Counter")
        <class 'collections.Counter'>
    """
    module, colon, name = path.partition(":")
    if not (colon and name and module):
        raise ValueError(f"expected module:Class, found {path!r}")
    found = import_module(module)
    if not hasattr(found, name):
        raise ValueError(f"{path}: expected a class {name} in {module}, found none")
    return getattr(found, name)


def _loaded(load: Callable[[], Any], what: str) -> Any:
    try:
        return load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{what}: expected what can be imported, found {error}") from error
