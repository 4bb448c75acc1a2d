"""`benchmarks/soak.py`, shortened: memory flat, counts exact, no drift."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "benchmarks" / "soak.py"


@pytest.mark.slow
def test_a_short_soak():
    done = subprocess.run(
        [sys.executable, PROGRAM, "--steps", "20000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["is_passed"]
    assert result["are_counts_exact"]
    assert result["num_steps"] == 20000
    assert result["drift"] <= 1
    assert result["growth_bytes"] <= 4 * 2**20
    assert "20000/20000" in done.stderr, "a long program says how far it has come"
