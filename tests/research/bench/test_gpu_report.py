"""`benchmarks/gpu_report.py`, as far as it runs without a GPU."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "gpu_report.py"
# Stands for a part: writes two rows, then what a case says.
CHILD = """
import sys, time
name, rows = sys.argv[sys.argv.index("--part") + 1], open(sys.argv[sys.argv.index("--rows") + 1], "w")
print('{"is_passed": true, "x": 1.5}', file=rows, flush=True)
print('{"is_passed": true, "y": "a|b"}', file=rows, flush=True)
if name == "slow":
    print('{"is_pas', file=rows, end="", flush=True)
    time.sleep(60)
if name == "broken":
    sys.exit("out of memory")
"""


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(str(PROGRAM), run_name="gpu_report")


def test_without_a_gpu_it_says_so_in_one_line(program, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--out", str(tmp_path / "report")])
    assert program["main"]() == 2
    found = capsys.readouterr()
    assert found.err == f"expected a CUDA device, found none (torch {torch.__version__})\n"
    assert found.out == ""
    assert not (tmp_path / "report").exists()


def test_a_dry_run_lists_the_parts(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", "--dry-run"])
    assert program["main"]() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [part.name for part in program["PARTS"]]
    assert all(f"{part.seconds} s" in line for part, line in zip(program["PARTS"], lines, strict=True))
    # All of them fit into six minutes, with some to spare for starting processes.
    assert sum(part.seconds for part in program["PARTS"]) <= program["SECONDS"] < 6 * 60


def test_what_was_done_is_kept(program, tmp_path):
    seconds = {"parity": 9, "slow": 2, "broken": 9}
    parts = [program["Part"](*part, "some part", lambda: None) for part in seconds.items()]
    where = {"device": "none", "torch": "2", "ovq": "0", "commit": "abc"}
    report = program["make_report"](tuple(parts), tmp_path, where, [sys.executable, "-c", CHILD])
    assert json.loads((tmp_path / "report.json").read_text()) == report
    statuses = [part["status"] for part in report["parts"].values()]
    assert statuses == [
        "complete",
        "stopped after 2 s, in the middle of a row",
        "failed with exit code 1: out of memory",
    ]
    assert [len(part["rows"]) for part in report["parts"].values()] == [2, 2, 2]
    page = (tmp_path / "report.md").read_text()
    assert "| is_passed | x | y |\n| --- | --- | --- |\n| True | 1.5 |  |\n| True |  | a/b |" in page
    assert not program["has_passed"](report)
    del report["parts"]["broken"]
    assert program["has_passed"](report)
    for part in ("slow", "parity"):
        row = report["parts"][part]["rows"][1]
        row["is_passed"] = False
        assert not program["has_passed"](report)
        row["is_passed"] = True


def test_parity_is_checked(program, monkeypatch):
    """In the interpreter: a row passes, and does not once the kernels lose a token."""
    pytest.importorskip("triton", reason="the extra ovq[triton] is not installed")
    from ovq.ops.backends.triton import passes

    arguments = ("existing", "float32", 5, 12, 4, 4, "cpu")
    assert program["parity_row"](*arguments)["is_passed"]
    assert program["parity_row"](*arguments, state_dtype="int8")["is_passed"]
    step = passes.Recurrence.step

    def forgetful(self, i, *shown):
        step(self, i, *shown)
        self.slots.clamp_(max=0)

    monkeypatch.setattr(passes.Recurrence, "step", forgetful)
    row = program["parity_row"](*arguments)
    assert not row["is_passed"]
    assert not row["are_counts_equal"]
