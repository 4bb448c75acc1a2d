"""Table and heat maps of `ovq.eval.needle`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from ovq.files import atomic_path

if TYPE_CHECKING:
    from ovq.eval.needle import NeedleRow

SCORES = {
    "generated": "share of values that greedy generation says",
    "token_accuracy": "share of value tokens that are the most likely ones",
    "choice": "share of values more likely than all others",
}
"""Fields of a row that say how good a model is, and what they are."""

_MOST_COLUMNS = 3


def needle_table(rows: Sequence[NeedleRow], *, title: str) -> Table:
    """A line for each model and depth, a column for each length, and in each cell the three scores.

    Args:
        rows: Results; models come in the order they are met.
        title: What stands above the table.
    """
    lengths = sorted({row.length for row in rows})
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"{length}", justify="right")
    for label in dict.fromkeys(row.label for row in rows):
        scores = {(row.length, row.depth): row for row in rows if row.label == label}
        for place, depth in enumerate(sorted({depth for _, depth in scores})):
            cells = [_cell(scores.get((length, depth))) for length in lengths]
            table.add_row("" if place else label, f"{depth:.0%}", *cells)
        table.add_section()
    return table


def save_needle_figures(rows: Sequence[NeedleRow], folder: Path) -> list[Path]:
    """Draw a heat map of length and depth for each model, on a page for each score.

    Args:
        rows: Results of all models.
        folder: Where to put `needle_SCORE.png`; must exist.

    Returns:
        The paths of the figures, one for each of `SCORES`.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("expected rows to draw, found none")
    lengths = sorted({row.length for row in rows})
    depths = sorted({row.depth for row in rows})
    labels = list(dict.fromkeys(row.label for row in rows))
    columns = min(_MOST_COLUMNS, len(labels))
    lines = -(-len(labels) // columns)
    width, height = 1.2 + 0.75 * len(lengths), 1.0 + 0.45 * len(depths)
    paths = []
    for score, what in SCORES.items():
        figure = Figure(figsize=(max(6.4, columns * width + 1.2), lines * height + 0.9), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, label in zip(panels, labels, strict=False):
            values = {(row.depth, row.length): getattr(row, score) for row in rows if row.label == label}
            grid = np.array([[values.get((d, n), np.nan) for n in lengths] for d in depths])
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for y, x in zip(*np.nonzero(~np.isnan(grid)), strict=True):
                # Dark on light and light on dark.
                color = "black" if grid[y, x] > 0.6 else "white"
                axes.text(x, y, f"{grid[y, x]:.2f}", ha="center", va="center", color=color, fontsize=8)
            axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
            axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axes.set_title(label, fontsize=10)
        for axes in panels[len(labels) :]:
            axes.remove()
        figure.colorbar(image, ax=panels[: len(labels)].tolist(), fraction=0.05)
        figure.supxlabel("length (tokens)", fontsize=10)
        figure.supylabel("depth of the needle", fontsize=10)
        figure.suptitle(f"{rows[0].value} in {rows[0].haystack}: {what}", fontsize=11)
        paths.append(folder / f"needle_{score}.png")
        with atomic_path(paths[-1]) as temporary:
            figure.savefig(temporary, dpi=150)
    return paths


def _cell(row: NeedleRow | None) -> str:
    """The scores of a row."""
    return "" if row is None else " ".join(f"{getattr(row, score):.2f}" for score in SCORES)
