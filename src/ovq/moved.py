"""Import of `ovq_lab` modules by their old names, from when the laboratory was part of this package.

Saved runs refer to classes by these names, and so may user code. An old name gives the new module itself, so
that there is only one class, however it is imported.
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
"""Old names of packages and modules, and their new names."""


class _Moved(MetaPathFinder, Loader):
    """Import hook that finds modules by their old names."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Spec of a module in `MOVED` or below; warns for the names in `MOVED`."""
        old = next((old for old in MOVED if f"{name}.".startswith(f"{old}.")), None)
        if old is None:
            return None
        # Imported here to keep `import ovq` light.
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
        """Restore the spec with the new name; the module has already been executed."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state

    def get_code(self, name: str) -> CodeType | None:
        """Code for `python -m`."""
        spec = self.find_spec(name)
        return None if spec is None else spec.loader_state.loader.get_code(spec.loader_state.name)


def moved_mixer(name: str) -> Any:
    """A mixer class that used to be in `ovq.layers`, by name.

    Raises:
        AttributeError: If there was no such class.
        MissingLaboratory: If the laboratory is not installed.
    """
    from ovq.plugins import LABORATORY, from_laboratory

    path = next((path for path in LABORATORY["mixer"].values() if path.endswith(f":{name}")), None)
    if path is None:
        raise AttributeError(f"module 'ovq.layers' has no attribute {name!r}")
    warnings.warn(f"ovq.layers.{name} is now ovq_lab.mixers.{name}", FutureWarning, stacklevel=2)
    found = from_laboratory(path, what=f"ovq.layers.{name}")
    # Stored, as an import looks it up twice.
    setattr(sys.modules["ovq.layers"], name, found)
    return found


def install() -> None:
    """Install the import hook for old names."""
    # Before Python's own finders, which would load a file twice for a package with two names.
    sys.meta_path.insert(0, _Moved())
