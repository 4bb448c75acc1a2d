"""Where transformers' own tests come from: `python -m tests.peers.sources FOLDER` gets them.

They are not installed with transformers. Its source distribution holds the files at the top of its `tests/`,
among them `ModelTesterMixin`; the folders below, among them `GenerationTesterMixin`, are in its repository
alone. With a checkout of it: `make test-peers TRANSFORMERS_TESTS=CHECKOUT/tests`.
"""

import subprocess
import sys
import tarfile
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

import tests

#: Modules that the files at the top import and a source distribution lacks, and what they want of each.
MISSING = {
    "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def add_to_path(folder: str) -> None:
    """Let `import tests.test_modeling_common` find transformers' file, beside our own `tests`."""
    if not (Path(folder) / "test_modeling_common.py").is_file():
        raise ValueError(
            f"TRANSFORMERS_TESTS: expected a folder with test_modeling_common.py, found {folder!r}"
        )
    tests.__path__.append(str(Path(folder).absolute()))
    for name, content in MISSING.items():
        package = name.rpartition(".")[0]
        if not (Path(folder).parent / package.replace(".", "/")).is_dir():
            sys.modules[package] = types.ModuleType(package)
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(content)


def is_missing(name: str) -> bool:
    """Whether a module of `MISSING` is empty, for want of a checkout."""
    return name in sys.modules and sys.modules[name].__spec__ is None


def download(cache: Path) -> Path:
    """The `tests` folder of the installed version, from its source distribution."""
    release = f"transformers-{version('transformers')}"
    folder = cache / release
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
            source = ["--no-binary", "transformers", release.replace("-", "==")]
            subprocess.run([*pip, *source], check=True, stdout=sys.stderr)
            with tarfile.open(Path(scratch) / f"{release}.tar.gz") as archive:
                members = [m for m in archive.getmembers() if m.name.startswith(f"{release}/tests/")]
                archive.extractall(scratch, members, filter="data")
            # Of which one test reads a file that is not in the archive.
            (Path(scratch) / release / "tests" / "__init__.py").touch()
            (Path(scratch) / release).rename(folder)
    return folder / "tests"


if __name__ == "__main__":
    print(download(Path(sys.argv[1])).absolute())
