"""The table and heat maps of `ovq_lab.eval.needle`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ovq_lab.plots.heat import draw_heat_maps
from ovq_lab.plots.panels import save
from ovq_lab.plots.style import style_name

if TYPE_CHECKING:
    from ovq_lab.eval.needle import NeedleRow

SCORES = {
    "generated": "share of values that greedy generation says",
    "token_accuracy": "share of value tokens that are the most likely ones",
    "choice": "share of values more likely than all others",
}


def needle_table(rows: Sequence[NeedleRow], *, title: str) -> Table:
    """One line for each model and depth, one column for each length, and the three scores in each cell."""
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
    """Draw a heat map of length and depth for each model and score into `folder`, which must exist; returns
    the paths."""
    if not rows:
        raise ValueError("expected rows to draw, found none")
    lengths = sorted({row.length for row in rows})
    depths = sorted({row.depth for row in rows})
    labels = list(dict.fromkeys(row.label for row in rows))
    paths = []
    for score, what in SCORES.items():
        maps = {}
        for label in labels:
            values = {(row.depth, row.length): getattr(row, score) for row in rows if row.label == label}
            maps[label] = [[values.get((depth, n), math.nan) for n in lengths] for depth in depths]
        figure = draw_heat_maps(
            maps,
            models={row.label: (style_name(row.mixer, row.merge), row.num_slots) for row in rows},
            columns=[str(length) for length in lengths],
            rows=[f"{depth:.0%}" for depth in depths],
            column_name="length (tokens)",
            row_name="depth of the needle",
            value_name=what,
            title=f"{rows[0].value} in {rows[0].haystack}",
        )
        paths.append(folder / f"needle_{score}.png")
        save(figure, paths[-1])
    return paths


def _cell(row: NeedleRow | None) -> str:
    return "" if row is None else " ".join(f"{getattr(row, score):.2f}" for score in SCORES)
