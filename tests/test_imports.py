"""Imports go one way, and nowhere in a circle."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
# The order, written once: a module imports from its own group or from those before it.
ORDER = [
    ["runtime", "fields"],
    ["plugins"],
    ["ops"],
    ["layers", "gmr"],
    ["hf"],
    ["parallel", "text"],
    ["convert"],
    ["tasks"],
    ["train", "eval", "inspect"],
    ["plots"],
    ["research", "serve"],
    ["cli"],
    ["__main__"],
]
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCE.rglob("*.py")
}


@pytest.mark.parametrize(
    "path", [SOURCE / "ovq" / "__init__.py", SOURCE.parent / "CONTRIBUTING.md"], ids=lambda path: path.name
)
def test_the_order_is_the_one_that_is_written(path):
    (written,) = re.findall(
        r"imports go one way: (.*?)\.\s", path.read_text(), flags=re.DOTALL | re.IGNORECASE
    )
    groups = [re.split(r"[,\s]+", group.strip()) for group in written.split("<-")]
    # Users see neither: one is beside the others, one is the command line itself.
    expected = [[name for name in names if name not in ("gmr", "__main__")] for names in ORDER]
    assert groups == [names for names in expected if names]


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def imported(path):
    """Modules of ours that a file imports, those in functions and those for types included."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "ovq")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ovq":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"ovq"}))
def test_imports_go_one_way(name):
    package = name.split(".")[1]
    for other in imported(MODULES[name]):
        if other != "ovq":
            assert RANKS[other.split(".")[1]] <= RANKS[package], f"{name} imports {other}"


def test_packages_of_one_rank_do_not_meet():
    for name, path in MODULES.items():
        package = name.split(".")[1] if name != "ovq" else None
        for other in imported(path):
            its = other.split(".")[1] if other != "ovq" else None
            if package and its and package != its:
                assert RANKS[package] != RANKS[its], f"{name} imports {other}"


def order_of(graph):
    """Modules, each after those that it imports. Raises CycleError, which names the circle."""
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_no_imports_go_in_a_circle():
    assert order_of({name: {*imported(path)} - {name} for name, path in MODULES.items()})


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
        order_of({"ovq.ops.call": {"ovq.ops.state"}, "ovq.ops.state": {*imported(low)}})


def test_layers_import_without_transformers_triton_matplotlib_or_the_compiler_of_torch():
    """The last takes as long as all the rest."""
    code = (
        "import sys, torch; before = set(sys.modules); import ovq.ops, ovq.layers; "
        "found = {'transformers', 'triton', 'matplotlib', 'torch._dynamo'} & (set(sys.modules) - before); "
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
