"""Tables and figures of `ovq_lab.eval.language`: loss by position, and by position in a chunk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table

from ovq.runtime.units import format_bytes
from ovq_lab.eval.rows import short_number
from ovq_lab.plots.canvas import Axes, FuncFormatter, NullLocator
from ovq_lab.plots.panels import new_panels, save
from ovq_lab.plots.style import row_styles

if TYPE_CHECKING:
    from ovq_lab.eval.language import LanguageRow

# Hundreds of markers on one line would merge into a stripe.
_MOST_MARKERS = 16


def language_table(rows: Sequence[LanguageRow], *, title: str) -> Table:
    """One line for each model and length: loss, bits per byte, speed, state."""
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for column in ("length", "windows", "loss", "bits/byte", "tokens/s", "state"):
        table.add_column(column, justify="right")
    for row in rows:
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        cells = (f"{row.length}", f"{row.num_windows}", f"{row.loss:.4f}", bits)
        table.add_row(row.label, *cells, f"{row.tokens_per_second:,.0f}", format_bytes(row.state_bytes))
    return table


def position_table(rows: Sequence[LanguageRow], *, title: str) -> Table:
    """Loss by octaves of positions at the longest length, and the sawtooth within chunks."""
    rows = _longest(rows)
    octaves = octave_losses(rows[0])
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for first, last, _ in octaves:
        table.add_column(f"{short_number(first)}-{short_number(last)}", justify="right")
    table.add_column("2nd - 1st half of chunk", justify="right")
    for row in rows:
        rise = "" if row.sawtooth is None else f"{row.sawtooth:+.4f}"
        error = "" if row.sawtooth_error is None else f" ± {row.sawtooth_error:.4f}"
        table.add_row(row.label, *(f"{loss:.4f}" for _, _, loss in octave_losses(row)), f"{rise}{error}")
    return table


def octave_losses(row: LanguageRow) -> list[tuple[int, int, float]]:
    """Mean loss of the first block, then of ranges that are each as long as all before: first position, end
    (exclusive) and loss of each range."""
    size, losses, num_positions = row.block_size, row.block_losses, row.length - 1
    octaves = []
    first, last = 0, 1
    while first < len(losses):
        last = min(last, len(losses))
        weights = [min(size, num_positions - i * size) for i in range(first, last)]
        total = sum(weight * loss for weight, loss in zip(weights, losses[first:last], strict=True))
        octaves.append((first * size, min(last * size, row.length), total / sum(weights)))
        first, last = last, last * 2
    return octaves


def save_language_figures(rows: Sequence[LanguageRow], folder: Path) -> list[Path]:
    """Draw the results of each model at its longest length into `folder`, which must exist.

    Returns:
        The paths of `loss.png` and, if a window holds whole chunks, `chunk.png`.
    """
    rows = _longest(rows)
    paths = []
    for name, draw in (("loss.png", _draw_positions), ("chunk.png", _draw_chunk)):
        figure, [axes] = new_panels(1, height=3.6)
        title = draw(axes, rows)
        if not axes.get_legend_handles_labels()[0]:
            continue
        save(figure, folder / name, title=title)
        paths.append(folder / name)
    return paths


def _longest(rows: Sequence[LanguageRow]) -> list[LanguageRow]:
    longest = max(row.length for row in rows)
    return [row for row in rows if row.length == longest]


def _draw_positions(axes: Axes, rows: Sequence[LanguageRow]) -> str:
    """Draw the loss by position, each block at its middle; returns the title."""
    for row in rows:
        edges = [min(i * row.block_size, row.length) for i in range(len(row.block_losses) + 1)]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        _plot(axes, rows, row, middles, row.block_losses)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(round(value))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("loss (nats per token)")
    size = rows[0].block_size
    windows = "1 window" if rows[0].num_windows == 1 else f"{rows[0].num_windows} windows"
    return f"Loss against position, {windows}, blocks of {size}"


def _draw_chunk(axes: Axes, rows: Sequence[LanguageRow]) -> str:
    """Draw the loss by position in a chunk, minus its mean, so that all models share an axis; returns the
    title."""
    for row in rows:
        if row.phase_losses:
            middle = fmean(row.phase_losses)
            places = range(len(row.phase_losses))
            _plot(axes, rows, row, places, [loss - middle for loss in row.phase_losses])
    axes.axhline(0, color="#BBBBBB", linestyle=":", zorder=0)
    axes.set_xlabel("position in the chunk (tokens)")
    axes.set_ylabel("loss less its mean (nats per token)")
    return "Loss by position in the chunk"


def _plot(
    axes: Axes,
    rows: Sequence[LanguageRow],
    row: LanguageRow,
    places: Sequence[float],
    values: Sequence[float],
) -> None:
    options = row_styles(rows)[row.label].options()
    if len(places) > _MOST_MARKERS:
        options |= {"markevery": len(places) // _MOST_MARKERS, "linewidth": 1.2}
    axes.plot(places, values, label=row.label, **options)
