"""What a build does beyond packing files: addresses of the project and compiled CPU kernels, if asked for.

    OVQ_REPOSITORY=OWNER/NAME python -m build

writes the addresses of that repository on GitHub into the metadata, and has the links of the README lead
there; the workflows name the repository they run in. No address stands in the files: a fork changes nothing.

    OVQ_BUILD_KERNELS=1 python -m build --wheel

compiles them for every level of this machine's family of processors (x86-64: avx2, avx512, avx512bf16, amx;
arm64: one) and makes a wheel for this system alone. Without it the wheel is the same for all systems, and the
kernels are compiled on first use. The compiled files have a C interface and call nothing of torch or Python:
they are used through ctypes, whatever the versions of both.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

_SWITCH = "OVQ_BUILD_KERNELS"
_FOLDER = "ovq/ops/backends/cpu"
_REPOSITORY = "OVQ_REPOSITORY"
_PAPER = "https://arxiv.org/abs/2602.03922"


class AddressesHook(MetadataHookInterface):
    """Says in the metadata where the project is, and shows the README as the package index needs it."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Set `urls` and `readme`; `version` is known.

        Raises:
            ValueError: if `OVQ_REPOSITORY` is not of the form OWNER/NAME.
        """
        repository = os.environ.get(_REPOSITORY, "").strip()
        if repository and re.fullmatch(r"[\w.-]+/[\w.-]+", repository) is None:
            raise ValueError(f"{_REPOSITORY}: expected OWNER/NAME, found {repository!r}")
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if repository:
            text = _with_absolute_links(text, repository, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {**(_urls(repository) if repository else {}), "Paper": _PAPER}


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


def _urls(repository: str) -> dict[str, str]:
    """What the package index shows beside the README."""
    owner, _, name = repository.partition("/")
    page = f"https://github.com/{repository}"
    return {
        "Repository": page,
        "Documentation": f"https://{owner}.github.io/{name}/",
        "Changelog": f"{page}/blob/main/CHANGELOG.md",
        "Issues": f"{page}/issues",
    }


def _with_absolute_links(text: str, repository: str, tag: str) -> str:
    """The index resolves no relative links: pictures are shown, documents linked as at the version."""
    picture = rf"![\1](https://raw.githubusercontent.com/{repository}/{tag}/\2)"
    text = re.sub(r"!\[([^\]]*)\]\((?!https?://)([^)#]+)\)", picture, text)
    document = rf"[\1](https://github.com/{repository}/blob/{tag}/\2)"
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", document, text)
