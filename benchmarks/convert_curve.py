"""Draws the losses of SmolLM2-135M-Instruct by rows per head: converted by its presets, and with a window.

    python benchmarks/convert_curve.py

Its numbers are those of docs/results/convert_presets.json, and for windows of convert_curve.json, which
`benchmarks/convert_pretrained.py` at cbdd5c69 measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ovq_lab.plots.canvas import NullLocator
from ovq_lab.plots.panels import new_panels, save
from ovq_lab.plots.style import MIXER_STYLES

RESULTS = Path(__file__).parents[1] / "docs" / "results"
# Names of the texts in convert_curve.json, and in convert_presets.json.
TEXTS = {"prose": "Hamlet", "code": "argparse.py"}
TICKS = (160, 256, 512, 768, 1100, 1600)


def points(file: str, text: str, method: str) -> list[tuple[float, float]]:
    """Rows per head and losses in a file, by rows."""
    rows = json.loads((RESULTS / file).read_text())["rows"]
    chosen = [row for row in rows if (row["what"], row["text"], row["method"]) == ("loss", text, method)]
    return sorted((row["rows"], row["loss"]) for row in chosen)


def draw(path: Path) -> None:
    """Plot the loss on the last third of 3,072 tokens against rows per head, one panel per text."""
    figure, panels = new_panels(len(TEXTS))
    for axes, (kind, text) in zip(panels, TEXTS.items(), strict=True):
        [(_, full)] = points("convert_curve.json", kind, "full")
        axes.axhline(full, label="full attention", color="black", linestyle=":")
        for label, style, found in (
            ("a window and its first tokens", "sink_attention", points("convert_curve.json", kind, "window")),
            ("ovq convert, presets", "ovq", points("convert_presets.json", text, "preset")),
        ):
            axes.plot(*zip(*found, strict=True), label=label, **MIXER_STYLES[style].options())
        axes.set(xscale="log", title=text, xlabel="rows per head, on average", ylabel="loss (nats per token)")
        axes.set_xticks(TICKS, [str(n) for n in TICKS])
        axes.xaxis.set_minor_locator(NullLocator())
    save(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "convert_curve.png")
    draw(parser.parse_args().out)
