"""The kernels compile for a GPU, which the interpreter cannot tell; no GPU is needed for that."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")
PROGRAM = Path(__file__).parents[3] / "benchmarks" / "compile_kernels.py"


def run(*options):
    """What the program prints with `options`, in a process where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, PROGRAM, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_shows_its_help():
    assert "usage:" in run("--help").lower()


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100():
    out = run("--head-dims", "64", "--dtypes", "bfloat16,float32", "--chunk-size", "64")
    rows = out.splitlines()[2:]
    kernels = {line.split()[0] for line in rows}
    assert kernels == {
        "advance",
        "nearest",
        "open_slots",
        "read",
        "rewind",
        "grad_queries",
        "grad_slots",
        "deposit",
        "grad_tokens",
        "read_token",
        "advance_items",
        "prepare",
        "settle",
        "keep",
    }
