"""The documentation names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_promise_names_a_test_there_is():
    text = (ROOT / "docs" / "guarantees.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert not missing


@pytest.mark.parametrize("name", ["benchmarks/soak.py", "benchmarks/float32_sums.py"])
def test_programs_behind_figures_are_there(name):
    assert f"`python {name}`" in (ROOT / "docs" / "guarantees.md").read_text()
    assert (ROOT / name).is_file()
