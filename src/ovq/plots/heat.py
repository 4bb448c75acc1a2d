"""Heat maps of shares: one for each model, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ovq.plots.canvas import Figure

_MOST_COLUMNS = 3


def draw_heat_maps(
    maps: Mapping[str, Sequence[Sequence[float]]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    column_name: str,
    title: str,
    row_name: str = "",
) -> Figure:
    """A map for each model, with the share written into each cell.

    Args:
        maps: By the name of the model the shares, from 0 to 1, of each row and column; NaN where there is
            none.
        columns: What the columns are.
        rows: What the rows are, from top to bottom.
        column_name: What stands below all maps.
        title: What stands above them.
        row_name: What stands beside them.
    """
    across = min(_MOST_COLUMNS, len(maps))
    down = -(-len(maps) // across)
    width, height = 1.2 + 0.75 * len(columns), 1.0 + 0.45 * len(rows)
    figure = Figure(figsize=(max(6.4, across * width + 1.2), down * height + 0.9), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (label, shares) in zip(panels, maps.items(), strict=False):
        grid = np.array(shares, dtype=np.float64)
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, x in zip(*np.nonzero(~np.isnan(grid)), strict=True):
            # Dark on light and light on dark.
            color = "black" if grid[y, x] > 0.6 else "white"
            axes.text(x, y, f"{grid[y, x]:.2f}", ha="center", va="center", color=color, fontsize=8)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(label, fontsize=10)
    for axes in panels[len(maps) :]:
        axes.remove()
    figure.colorbar(image, ax=panels[: len(maps)].tolist(), fraction=0.05)
    figure.supxlabel(column_name, fontsize=10)
    if row_name:
        figure.supylabel(row_name, fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure
