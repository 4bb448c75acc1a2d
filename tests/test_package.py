"""What the package says of itself: one version, links that work on the index, versions of Python."""

import re
from pathlib import Path

import pytest
import yaml

import ovq

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_place_names_the_same_version():
    # The changelog has a test of its own, in tests/test_docs.py.
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == ovq.__version__
    assert "version" in PROJECT["project"]["dynamic"], "pyproject.toml reads it from src/ovq/__init__.py"


def test_links_of_the_readme_are_absolute_on_the_package_index():
    text = (ROOT / "README.md").read_text()
    relative = re.findall(r"\]\((?!https?://|#)([^)]+)\)", text)
    assert len(relative) > 10
    assert [name for name in relative if not (ROOT / name.partition("#")[0]).is_file()] == []
    for rule in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert re.findall(r"\]\((?!https?://|#)([^)]+)\)", text) == []
    pages = [name for name in relative if name.endswith(".md")]
    assert all(f"/blob/v$HFPR_VERSION/{name})" in text for name in pages)
    # A picture has to be the file itself, not the page around it.
    assert re.search(r"!\[[^]]*\]\(https://raw\.\S+/v\$HFPR_VERSION/docs/results/\S+\.png\)", text)


def test_python_versions_that_are_named_are_tested():
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))
    tests = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    assert named == tests["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_files_that_a_workflow_names_are_there(path):
    text = path.read_text()
    assert yaml.safe_load(text)
    for name in re.findall(r"\b(?:tests|docs|src)/[\w/]+\.(?:py|txt|md)\b", text):
        assert (ROOT / name).is_file(), name
