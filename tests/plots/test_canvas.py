"""Where matplotlib is missing, figures say so in one line."""

import subprocess
import sys

# As if it had never been installed: the library, and then the command line, in a process of its own.
COMMAND = """
import sys
sys.modules["matplotlib"] = None
import ovq.hf, ovq.layers, ovq.ops, ovq_lab.train.loop
print("imported", flush=True)
from ovq.cli import main
sys.argv = ["ovq", "demo"]
main()
"""


def test_the_library_does_without_and_commands_that_draw_name_the_extra(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", COMMAND], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.stdout == "imported\n", result.stderr
    assert result.returncode == 2
    assert "expected matplotlib, found none; pip install './lab[plots]'" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
