"""Imports go one way, and nowhere in a circle; what programs import is there."""

import ast
import functools
import graphlib
import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ovq import plugins

ROOT = Path(__file__).parents[1]
# The order in each package, written once: a module imports from its own group or from those before it.
ORDER = {
    "ovq": [
        ["runtime", "fields", "byte_tokens", "hidden_values", "prompts"],
        ["plugins"],
        ["moved"],
        ["ops"],
        ["layers"],
        ["hf"],
        ["parallel"],
        ["convert"],
        ["inspect", "serve"],
        ["cli"],
    ],
    "ovq_lab": [
        ["runtime", "mixers", "text", "gmr"],
        ["tasks"],
        ["train", "eval"],
        ["plots"],
        ["bench"],
        ["figures"],
        ["cli"],
    ],
}
RANKS = {
    f"{package}.{name}": rank
    for package, order in ORDER.items()
    for rank, names in enumerate(order)
    for name in names
} | {"ovq.__main__": len(ORDER["ovq"])}
MODULES = {
    ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__"): path
    for source in (ROOT / "src", ROOT / "lab")
    for path in source.rglob("*.py")
}


@pytest.mark.parametrize(
    ("path", "packages"),
    [(ROOT / "CONTRIBUTING.md", [*ORDER]), *((MODULES[package], [package]) for package in ORDER)],
    ids=["CONTRIBUTING.md", *ORDER],
)
def test_the_order_is_the_one_that_is_written(path, packages):
    written = re.findall(r"imports go one way: (.*?)\.\s", path.read_text(), flags=re.DOTALL | re.IGNORECASE)
    groups = [[re.split(r"[,\s]+", group.strip()) for group in each.split("<-")] for each in written]
    assert groups == [ORDER[package] for package in packages]


@functools.cache
def imported(path):
    """Modules of ours that a file imports, those in functions and those for types included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in ORDER}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ORDER:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def part_of(name):
    """`ovq.ops` for all modules in it."""
    return ".".join(name.split(".")[:2])


def test_imports_go_one_way():
    pairs = [(name, part_of(other)) for name, path in MODULES.items() for other in imported(path)]
    for name, other in pairs:
        part = part_of(name)
        if name in ORDER or other in ORDER:
            continue
        if other.split(".")[0] == part.split(".")[0]:
            assert other == part or RANKS[other] < RANKS[part], f"{name} imports {other}"
        else:
            assert other.startswith("ovq."), f"{name} imports {other}: the library has no laboratory"


def test_the_table_of_the_laboratory_is_right():
    for paths in plugins.LABORATORY.values():
        for path in paths.values():
            assert plugins.from_laboratory(path, what="a test") is not None


def order_of(graph):
    """Modules, each after those that it imports. Raises CycleError, which names the circle."""
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_no_imports_go_in_a_circle():
    assert order_of({name: imported(path) - {name} for name, path in MODULES.items()})


@pytest.mark.parametrize(
    "back",
    [
        "from ovq.ops.call import Call",
        "def lazy():\n    from ovq.ops.call import Call",
        "if TYPE_CHECKING:\n    from ovq.ops import call",
        "def lazy():\n    import ovq.ops.call",
    ],
)
def test_a_circle_would_be_found(back, tmp_path):
    low = tmp_path / "state.py"
    low.write_text(back)
    with pytest.raises(graphlib.CycleError):
        order_of({"ovq.ops.call": {"ovq.ops.state"}, "ovq.ops.state": imported(low)})


def test_layers_and_recipes_import_without_transformers_matplotlib_or_the_compiler_of_torch():
    """The last takes as long as all the rest, and a recipe with a wrong word is to be refused at once."""
    code = (
        "import sys, torch; before = set(sys.modules); "
        "import ovq.ops, ovq.layers, ovq_lab.train.recipe_file; "
        "found = {'transformers', 'triton', 'matplotlib', 'torch._dynamo'} & (set(sys.modules) - before); "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_programs_import_is_there():
    """No other test runs all of `benchmarks/`."""
    imported = [
        (path.name, node.module, alias.name)
        for path in (ROOT / "benchmarks").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("ovq", "ovq_lab")
        for alias in node.names
    ]
    assert len({name for name, _, _ in imported}) > 3
    for name, module, attribute in imported:
        is_there = hasattr(importlib.import_module(module), attribute)
        assert is_there or importlib.util.find_spec(f"{module}.{attribute}"), f"{name}: {module}.{attribute}"


# Without the one that imports Triton for a GPU, after which no test could interpret its kernels.
PROGRAMS = sorted({*(ROOT / "benchmarks").glob("*.py")} - {ROOT / "benchmarks" / "compile_kernels.py"})


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_programs_show_their_help_before_they_measure(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out.lower()
