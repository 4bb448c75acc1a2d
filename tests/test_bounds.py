"""The lower bounds of the dependencies are those that the tests are run with, see `make test-oldest`."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What nobody runs the library with: the linters, and what builds the package.
TOOLS = {"ruff", "mypy", "hatchling"}


def test_the_oldest_dependencies_are_those_that_are_allowed():
    # Nothing stands on the neighbours whose suites run on our models, nor on what builds the site.
    project = (ROOT / "pyproject.toml").read_text()
    project = re.sub(r"\n(?:peers|docs) = \[.*?\n\]", "", project, flags=re.DOTALL)
    allowed = dict(re.findall(r'"([\w-]+)>=([\d.]+)', project))
    tested = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests/oldest.txt").read_text(), re.MULTILINE))
    assert len(allowed) > 15

    def release(version):
        return [int(part) for part in f"{version}.0.0".split(".")[:3]]

    for name in allowed.keys() - TOOLS:
        assert release(tested[name]) == release(allowed[name]), name
