"""The pages of the site: all of them are in its menu, all public names in its reference, all tutorials run.

`make docs` builds the site, with the tutorials as they are; here they train for fewer steps.
"""

import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from ovq.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
# Pages that docs_site.py makes.
MADE = {"cli.md", "contributing.md", "security.md", "changelog.md"}


def menu(item):
    """The pages of a menu."""
    if isinstance(item, str):
        return [item]
    return [page for part in (item.values() if isinstance(item, dict) else item) for page in menu(part)]


def test_every_page_is_in_the_menu_once():
    named = menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {str(page.relative_to(DOCS)) for kind in ("*.md", "*.ipynb") for page in DOCS.rglob(kind)}
    assert sorted(named) == sorted(pages | MADE)


def text_of(path):
    """A page's text without its programs, or that of the text cells of a notebook."""
    if path.suffix != ".ipynb":
        return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


of_pages = pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), *NOTEBOOKS],
    ids=lambda path: path.name,
)


@of_pages
def test_links_lead_to_files_there_are(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text_of(page)):
        target = page.parent / link
        # Pages that are made for the site are no files of the repository.
        assert target.is_file(), link
        # What lies outside docs/ is not on the site.
        assert page.parent == ROOT or DOCS in target.resolve().parents, link


def anchors_of(page):
    """Of the headings of a page, those that the site and forges give the same anchor."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    names = [re.sub(r"[^\w\s-]", "", name).lower() for name in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[-\s]+", "-", name) for name in names} & {name.replace(" ", "-") for name in names}


@of_pages
def test_anchors_are_headings_there_are(page):
    for link, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", text_of(page)):
        target = page.parent / link if link else page
        # Pages of the reference have headings that are made from docstrings.
        assert target.suffix != ".md" or "api" in target.parts or anchor in anchors_of(target), (link, anchor)


@pytest.mark.parametrize(
    "name",
    [f"ovq.{name}" for name in ("ops", "layers", "hf", "convert", "parallel", "inspect")]
    + [f"ovq_lab.{name}" for name in ("mixers", "tasks", "text", "gmr")],
)
def test_every_public_name_is_in_the_reference(name):
    reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = set(re.findall(rf"^::: {name}\.(\w+)$", reference, flags=re.MULTILINE))
    assert shown >= set(importlib.import_module(name).__all__)


def test_the_reference_names_what_there_is():
    names = re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.M)
    assert len(names) > 60
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def cells_of(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    assert [cell["outputs"] for cell in cells_of(path) if cell["outputs"] or cell["execution_count"]] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorials_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells_of(path)):
        code = re.sub(r"STEPS = \d+", "STEPS = 2", "".join(cell["source"]))
        exec(compile(code, f"{path.name}, code cell {number}", "exec"), names)
    assert list(tmp_path.iterdir()) == [], "files that a reader would find beside the notebook"


def test_the_first_results_can_be_followed():
    # What benchmarks/first_results.py does takes minutes; here is what it would do.
    program = runpy.run_path(str(ROOT / "benchmarks" / "first_results.py"))
    parts = program["parts_of"]((DOCS / "use" / "first_results.md").read_text())
    assert len(parts) == 3
    group = typer.main.get_command(app)
    for files, commands in parts.values():
        assert commands[:2] == ["python3 -m venv .venv", ". .venv/bin/activate"]
        assert any(command.startswith("pip install") for command in commands)
        for name, text in files.items():
            if name.endswith(".py"):
                compile(text, name, "exec")
                assert f"python {name}" in commands
        for words in (shlex.split(command.removesuffix(" &")) for command in commands):
            if words[0] == "ovq":
                command, rest = group, words[1:]
                while rest[0] in getattr(command, "commands", {}):
                    command, rest = command.commands[rest[0]], rest[1:]
                # Raises where there is no such option, and runs nothing.
                command.make_context(command.name, rest)
    script = program["script_of"](["serve &", "ask"])
    assert script.index("serve &") < script.index(program["READY"]) < script.index("$ ask")


@pytest.mark.slow
def test_a_first_model_has_the_losses_that_the_page_names(tmp_path):
    """Rounding decides the digits; on any processor they lie between those that the page names."""
    program = runpy.run_path(str(ROOT / "benchmarks" / "first_results.py"))
    page = (DOCS / "use" / "first_results.md").read_text()
    files, _ = program["parts_of"](page)["The layer in a model of your own"]
    (tmp_path / "own_model.py").write_text(files["own_model.py"])
    # Threads that wait for each other on a busy machine would take minutes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "own_model.py"]
    printed = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    [named] = re.findall(r"\nOther processors and threads give (.*?) \(", page)
    bounds = [text.split(" to ") for text in re.split(", | and ", named)]
    for text in (page, printed):
        losses = re.findall(r"\n1,024 letters, \d+ slots, merged by \w+: loss ([\d.]+)", text)
        for loss, bound in zip(losses, bounds, strict=True):
            assert float(bound[0]) <= float(loss) <= float(bound[-1])


def test_the_tour_runs():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "use" / "tour.md").read_text(), flags=re.DOTALL):
        exec(block, names)
    assert names["found"].slots.shape == (1, 8, 4096)
