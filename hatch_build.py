"""What the build of a wheel does beyond packing files: it compiles the CPU kernels, if it is asked to.

    OVQ_BUILD_KERNELS=1 python -m build --wheel

compiles them for every level of this machine's family of processors (x86-64: avx2, avx512, avx512bf16;
arm64: one) and makes a wheel for this system alone. Without it the wheel is the same for all systems, and the
kernels are compiled on first use. The compiled files have a C interface and call nothing of torch or Python:
they are used through ctypes, whatever the versions of both.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SWITCH = "OVQ_BUILD_KERNELS"
_FOLDER = "ovq/ops/backends/cpu"


class KernelsHook(BuildHookInterface):
    """Adds kernels to a wheel."""

    PLUGIN_NAME = "custom"
    _place: Path | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the kernels and name them to the wheel.

        Raises:
            ValueError: if `OVQ_BUILD_KERNELS` is neither 0 nor 1.
            RuntimeError: if kernels are asked for and cannot be compiled. A wheel that should
                have them and has none must not be published.
        """
        wish = os.environ.get(_SWITCH, "").strip() or "0"
        if wish not in ("0", "1"):
            raise ValueError(f"{_SWITCH}: expected 0 or 1, found {wish!r}")
        # An editable installation runs from the sources, where compiled files would soon be out of date.
        if wish == "0" or self.target_name != "wheel" or version == "editable":
            return
        compiler = _compiler_module(Path(self.root))
        levels = compiler.machine_levels()
        if not levels:
            raise RuntimeError(
                f"{_SWITCH}=1: no kernels for this system; they are for x86-64 and arm64 on Linux, macOS"
            )
        self._place = Path(tempfile.mkdtemp(prefix="ovq-kernels-"))
        for level in levels:
            self.app.display_info(f"compiling the CPU kernels for {level.name}")
            try:
                binary = compiler.compile_kernels(compiler.find_compiler(), level.flags, self._place)
            except compiler.Unavailable as error:
                raise RuntimeError(f"{_SWITCH}=1: {error}") from error
            path = self._place / compiler.prebuilt_name(level)
            path.write_bytes(binary)
            build_data["force_include"][str(path)] = f"{_FOLDER}/prebuilt/{path.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove what was compiled; the wheel has it."""
        if self._place is not None:
            shutil.rmtree(self._place)


def _compiler_module(root: Path) -> ModuleType:
    """`ovq.ops.backends.cpu.compiler`, without importing the packages around it, which need torch."""
    path = root / "src" / _FOLDER / "compiler.py"
    spec = importlib.util.spec_from_file_location("ovq_compiler", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
