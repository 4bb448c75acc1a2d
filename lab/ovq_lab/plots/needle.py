"""The table and heat maps of `ovq_lab.eval.needle`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ovq_lab.plots.draw import Panel, save_heat_maps

if TYPE_CHECKING:
    from ovq_lab.eval.needle import NeedleRow

SCORES = ("generated", "token_accuracy", "choice")


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
    depths = [f"{depth:.0%}" for depth in sorted({row.depth for row in rows})]
    fields = [
        dataclasses.asdict(row) | {"line": row.label, "group": f"{row.depth:.0%}", "seed": 0} for row in rows
    ]
    paths = []
    for score in SCORES:
        panels = [Panel(title=depth, y=score, group=depth) for depth in depths]
        results = {
            "title": f"{rows[0].value} in {rows[0].haystack}",
            "panels": list(map(dataclasses.asdict, panels)),
            "rows": fields,
        }
        paths.append(folder / f"needle_{score}.png")
        save_heat_maps(results, paths[-1], row_name="depth of the needle")
    return paths


def _cell(row: NeedleRow | None) -> str:
    return "" if row is None else " ".join(f"{getattr(row, score):.2f}" for score in SCORES)
