"""The picture of converted models is drawn from the file of its rows."""

import json
import runpy
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_committed_losses_are_drawn(tmp_path):
    program = runpy.run_path(str(ROOT / "benchmarks" / "convert_pretrained.py"))
    rows = json.loads((ROOT / "docs" / "results" / "convert_curve.json").read_text())["rows"]
    program["draw"](rows, tmp_path / "convert_curve.png")
    with Image.open(tmp_path / "convert_curve.png") as drawn:
        drawn.verify()
