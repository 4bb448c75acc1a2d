"""Where matplotlib is missing, figures say so in one line."""

import os
import sys

from tests.processes import forked


def demo_without_matplotlib(folder):
    """The command as if matplotlib had never been installed, after the library has been imported."""
    os.chdir(folder)
    os.dup2(os.open("errors", os.O_WRONLY | os.O_CREAT), 2)
    assert {"ovq.hf", "ovq_lab.train.loop"} <= {*sys.modules}
    assert "matplotlib" not in sys.modules
    sys.modules["matplotlib"] = None
    from ovq.cli import main

    sys.argv = ["ovq", "demo"]
    main()


def test_the_library_does_without_and_commands_that_draw_name_the_extra(tmp_path):
    process = forked(demo_without_matplotlib, tmp_path)
    process.start()
    process.join()
    errors = (tmp_path / "errors").read_text()
    assert process.exitcode == 2, errors
    assert "expected matplotlib, found none; pip install './lab[plots]'" in " ".join(errors.split())
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["errors"]
