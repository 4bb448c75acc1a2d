"""The names that modules of the laboratory had when it was part of this package.

Runs that were saved then name classes by them, and so may code of users. An old name stands for the new
module itself, so that there is one class, whichever way it is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

MOVED = {
    "ovq.research.reproduce": "ovq_lab.figures",
    "ovq.research.fidelity": "ovq_lab.figures.fidelity",
    "ovq.research.demo": "ovq_lab.figures.demo",
    "ovq.research": "ovq_lab",
    **{f"ovq.{name}": f"ovq_lab.{name}" for name in ("tasks", "text", "train", "eval", "gmr", "plots")},
    **{
        f"ovq.layers.{name}": f"ovq_lab.mixers.{name}"
        for name in ("vq", "kvm", "kvm_slots", "kvm_state", "raven", "kda", "mesanet", "linear")
    },
}
"""Packages and modules, and where they are now."""


class _Moved(MetaPathFinder, Loader):
    """Finds modules by their old names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """For a name in `MOVED`, or one below; the first of them warns."""
        old = next((old for old in MOVED if f"{name}.".startswith(f"{old}.")), None)
        if old is None:
            return None
        # Here, because `import ovq` is light.
        from ovq.plugins import MissingLaboratory, has_laboratory

        if not has_laboratory():
            raise MissingLaboratory(name)
        new = MOVED[old] + name.removeprefix(old)
        if name == old:
            warnings.warn(f"{name} is now {new}", FutureWarning, stacklevel=2)
        found = importlib.util.find_spec(new)
        return None if found is None else ModuleSpec(name, self, loader_state=found)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module under its new name."""
        return importlib.import_module(spec.loader_state.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to be executed; but the module is not to be called by its old name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, name: str) -> CodeType | None:
        """What `python -m` runs."""
        spec = self.find_spec(name)
        return None if spec is None else spec.loader_state.loader.get_code(spec.loader_state.name)


def moved_mixer(name: str) -> Any:
    """A mixer that `ovq.layers` had, by the name of its class.

    Raises:
        AttributeError: If it had none of this name.
        MissingLaboratory: If the laboratory is not installed.
    """
    from ovq.plugins import LABORATORY, from_laboratory

    path = next((path for path in LABORATORY["mixer"].values() if path.endswith(f":{name}")), None)
    if path is None:
        raise AttributeError(f"module 'ovq.layers' has no attribute {name!r}")
    warnings.warn(f"ovq.layers.{name} is now ovq_lab.mixers.{name}", FutureWarning, stacklevel=2)
    found = from_laboratory(path, what=f"ovq.layers.{name}")
    # An import asks twice.
    setattr(sys.modules["ovq.layers"], name, found)
    return found


def install() -> None:
    """Let old names be imported."""
    # Before Python's own finders, which would make a second module of a file in a package with two names.
    sys.meta_path.insert(0, _Moved())
