"""Heat maps of shares: one map per model, one below the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ovq_lab.plots.canvas import Figure
from ovq_lab.plots.panels import WIDTH, wrapped
from ovq_lab.plots.style import line_styles


def draw_heat_maps(
    maps: Mapping[str, Sequence[Sequence[float]]],
    *,
    models: Mapping[str, tuple[str, int | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    column_name: str,
    value_name: str,
    title: str,
    row_name: str = "",
) -> Figure:
    """Draw one map for each model, framed in the colour of its mixer, with the share written into each cell.

    `maps` has shares from 0 to 1 by row and column, NaN for missing ones; `models` is as for `line_styles`.
    """
    height = 0.55 + 0.27 * len(rows)
    figure = Figure(figsize=(WIDTH, height * len(maps) + 1.5), layout="constrained")
    panels = figure.subplots(len(maps), 1, squeeze=False).flatten()
    styles = line_styles(models)
    for axes, (label, shares) in zip(panels, maps.items(), strict=True):
        grid = np.array(shares, dtype=np.float64)
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, x in zip(*np.nonzero(~np.isnan(grid)), strict=True):
            # Dark text on light cells, and light text on dark ones.
            color = "black" if grid[y, x] > 0.6 else "white"
            axes.text(x, y, f"{grid[y, x]:.2f}", ha="center", va="center", color=color, fontsize=9)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(label, fontsize=11)
        axes.spines[:].set(color=styles[label].color, linewidth=2.5)
    bar = figure.colorbar(
        image, ax=panels.tolist(), location="bottom", fraction=0.05, aspect=40, pad=0.01 + 0.06 / len(maps)
    )
    bar.set_label(value_name, fontsize=10)
    panels[-1].set_xlabel(column_name, fontsize=10)
    if row_name:
        figure.supylabel(row_name, fontsize=10)
    figure.suptitle(wrapped(title), fontsize=12)
    return figure
