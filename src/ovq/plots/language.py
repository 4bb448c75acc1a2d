"""Tables and figures of `ovq.eval.language`: loss against position, and against the place in a chunk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from rich.table import Table

from ovq.eval.rows import format_bytes
from ovq.plots.canvas import Axes, Figure, FuncFormatter, NullLocator
from ovq.runtime.files import atomic_path

if TYPE_CHECKING:
    from ovq.eval.language import LanguageRow

# Okabe and Ito's colours and two between them, which differ for colour-blind readers too.
_COLORS = (
    *("#08456E", "#3A8FC4", "#E69F00", "#009E73", "#D55E00"),
    *("#CC79A7", "#6B6B6B", "#8C6BB1", "#A6761D", "#000000"),
)
_LINES = ("-", "--", ":", "-.")


def language_table(rows: Sequence[LanguageRow], *, title: str) -> Table:
    """A line for each model and length: loss, bits a byte, speed, state."""
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
    """Loss in octaves of positions at the longest length, and how much higher it is late in a chunk."""
    rows = _longest(rows)
    octaves = octave_losses(rows[0])
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    for first, last, _ in octaves:
        table.add_column(f"{_short(first)}-{_short(last)}", justify="right")
    table.add_column("2nd - 1st half of chunk", justify="right")
    for row in rows:
        rise = "" if row.sawtooth is None else f"{row.sawtooth:+.4f}"
        error = "" if row.sawtooth_error is None else f" ± {row.sawtooth_error:.4f}"
        table.add_row(row.label, *(f"{loss:.4f}" for _, _, loss in octave_losses(row)), f"{rise}{error}")
    return table


def octave_losses(row: LanguageRow) -> list[tuple[int, int, float]]:
    """Mean loss of the first block, and of twice as many positions each time after it.

    Returns:
        First position, the one after the last, and the mean loss between them, weighted by positions.
    """
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
    """Draw `loss.png` and `chunk.png` from what each model did at its longest length.

    Args:
        rows: Results of all models.
        folder: Where to put the figures; must exist.

    Returns:
        The paths of the figures; only the first where no window holds whole chunks.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("expected rows to draw, found none")
    rows = _longest(rows)
    paths = []
    for name, draw in (("loss.png", _draw_positions), ("chunk.png", _draw_chunk)):
        figure = Figure(figsize=(7.6, 4.4), layout="constrained")
        axes = figure.subplots()
        draw(axes, rows)
        if not axes.get_legend_handles_labels()[0]:
            continue
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        with atomic_path(folder / name) as temporary:
            figure.savefig(temporary, dpi=150)
        paths.append(folder / name)
    return paths


def _longest(rows: Sequence[LanguageRow]) -> list[LanguageRow]:
    """The rows at the longest length."""
    longest = max(row.length for row in rows)
    return [row for row in rows if row.length == longest]


def _draw_positions(axes: Axes, rows: Sequence[LanguageRow]) -> None:
    """Loss against position, each block at its middle."""
    for place, row in enumerate(rows):
        edges = [min(i * row.block_size, row.length) for i in range(len(row.block_losses) + 1)]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        axes.plot(middles, row.block_losses, label=row.label, marker=".", markersize=4, **_style(place))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(round(value))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position (tokens)")
    axes.set_ylabel("loss (nats a token)")
    size = rows[0].block_size
    axes.set_title(f"Loss against position, {rows[0].num_windows} windows, blocks of {size}")


def _draw_chunk(axes: Axes, rows: Sequence[LanguageRow]) -> None:
    """Loss against the place in a chunk, less its mean, so that models of any quality share an axis."""
    for place, row in enumerate(rows):
        if row.phase_losses:
            middle = fmean(row.phase_losses)
            axes.plot(
                [loss - middle for loss in row.phase_losses], label=row.label, linewidth=1.2, **_style(place)
            )
    axes.axhline(0, color="#BBBBBB", linestyle=":", zorder=0)
    axes.set_xlabel("position in the chunk (tokens)")
    axes.set_ylabel("loss less its mean (nats a token)")
    axes.set_title("Loss by position in the chunk")


def _style(place: int) -> dict[str, str]:
    """Colour and line of the model at this place in the legend."""
    return {
        "color": _COLORS[place % len(_COLORS)],
        "linestyle": _LINES[place // len(_COLORS) % len(_LINES)],
    }


def _short(length: int) -> str:
    """A number of tokens, in thousands where it is a multiple of 1024.

    Example:
        >>> _short(1023), _short(4096)
        ('1023', '4k')
    """
    return f"{length // 1024}k" if length and length % 1024 == 0 else str(length)
