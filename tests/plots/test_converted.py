"""The picture of converted models is drawn from the files of its rows."""

import runpy
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_committed_losses_are_drawn(tmp_path):
    program = runpy.run_path(str(ROOT / "benchmarks" / "convert_curve.py"))
    for text in ("Hamlet", "argparse.py"):
        found = program["points"]("convert_presets.json", text, "preset")
        assert [rows for rows, _ in found] == [256, 512, 768, 1100]
    program["draw"](tmp_path / "convert_curve.png")
    with Image.open(tmp_path / "convert_curve.png") as drawn:
        drawn.verify()
