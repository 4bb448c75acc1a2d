"""What is killed and started again ends as if it had never stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ovq_lab.figures.engine import reproduce
from ovq_lab.figures.figures import get_figure
from tests.research.reproduce.common import TINY, rows_of, run_here, with_steps, workshop

ROOT = Path(__file__).parents[3]


PROGRAM = """
import sys
from pathlib import Path
from ovq_lab.plots.draw import points
from ovq_lab.figures.engine import reproduce
from ovq_lab.figures.figures import get_figure
from ovq_lab.figures.figures import get_figure
from ovq.runtime.files import claimed
from tests.research.reproduce.common import TINY, with_steps, workshop

if __name__ == "__main__":
    out, steps = Path(sys.argv[1]), int(sys.argv[2])
    with claimed(out, command="ovq reproduce"):
        reproduce(get_figure("dictionary", with_steps(TINY, steps)), workshop(out, num_seeds=1))
"""


def start(out, steps):
    """A process that makes a figure, with workers of its own."""
    (out.parent / "program.py").write_text(PROGRAM)
    return subprocess.Popen(
        [sys.executable, str(out.parent / "program.py"), str(out), str(steps)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "src", ROOT / "lab"))),
        },
        cwd=ROOT,
    )


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_killed_by_kill_9_and_started_again_it_ends_as_if_never_stopped(tmp_path, monkeypatch):
    steps = 60
    out = tmp_path / "out"
    process = start(out, steps)
    begun = time.monotonic()
    while not list(out.glob("runs/*/checkpoint-*/seal.json")):
        assert process.poll() is None
        assert time.monotonic() - begun < 600
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(out.glob("runs/*/model.safetensors"))
    # The workers end by themselves: going on unseen, they would write into the folders of the next ones.
    begun = time.monotonic()
    while any(Path(f"/proc/{worker}").exists() and "Z" not in stat(worker) for worker in workers):
        assert time.monotonic() - begun < 120
        time.sleep(0.05)
    assert workers
    assert start(out, steps).wait(timeout=900) == 0

    undisturbed = tmp_path / "undisturbed"
    run_here(monkeypatch)
    reproduce(get_figure("dictionary", with_steps(TINY, steps)), workshop(undisturbed, num_seeds=1))
    assert rows_of(out, "dictionary") == rows_of(undisturbed, "dictionary")


def stat(pid):
    """The state of a process, a letter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
