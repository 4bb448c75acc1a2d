"""Layout of figures: panels one below the other, legible on a phone, with one legend above all panels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovq.runtime.files import atomic_path
from ovq_lab.plots.canvas import Axes, ConstrainedLayoutEngine, Figure, Image, NullLocator

WIDTH = 6.4
"""Inches: the width of a column of text, at which labels of 10 points are legible on a phone."""
_DPI = 150
_MOST_COLUMNS = 4
_LETTERS_A_LINE = 62
_LEGEND = 0.9
"""Inches for a legend; a higher legend makes the figure higher."""


def new_panels(count: int, *, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """A figure with a number of panels, each `height` inches high and with light grid lines."""
    # Leaves room between one panel's axis and the title of the next.
    layout = ConstrainedLayoutEngine(h_pad=0.08, hspace=0.02)
    figure = Figure(figsize=(WIDTH, height * count + _LEGEND), layout=layout)
    panels = list(figure.subplots(count, 1, squeeze=False).flatten())
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def mark_training(axes: Axes, length: int, label: str) -> None:
    """Draw a line at the longest training length."""
    axes.axvline(length, color="#BBBBBB", linestyle=":", zorder=0, label=label)


def length_axis(axes: Axes, lengths: Sequence[float], labels: Sequence[str]) -> None:
    """Set a log2 scale along x, with a tick at each length."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, labels, fontsize=9 if len(lengths) > 6 else 10)
    axes.xaxis.set_minor_locator(NullLocator())


def error_bars(
    axes: Axes, places: Sequence[float], points: Sequence[tuple[float, float, float]], **options: Any
) -> None:
    """Draw a line through means, with bars from lowest to highest values; `points` has all three in order."""
    # Through rounding, the mean of equal values may lie slightly outside of them.
    below = [max(0.0, mean - low) for mean, low, _ in points]
    above = [max(0.0, high - mean) for mean, _, high in points]
    means = [mean for mean, _, _ in points]
    axes.errorbar(places, means, yerr=[below, above], capsize=3, elinewidth=1.2, **options)


def save(figure: Figure, path: Path, *, title: str = "", first: Sequence[str] = ()) -> None:
    """Put the title and the legend above the panels, and write the picture atomically."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            # For a line with error bars, show only the line.
            handles.setdefault(label, getattr(handle, "lines", (handle,))[0])
    if handles:
        in_order = {label: handles[label] for label in (*first, *handles) if label in handles}
        _add_legend(figure, in_order, wrapped(title))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=_DPI)
        _shrink(temporary)


def _shrink(path: Path) -> None:
    """Quantize a PNG to 256 colours: a third of the bytes, and no visible difference."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, format="PNG", optimize=True)


def wrapped(title: str) -> str:
    """Wrap a title into as few lines as possible, all about equally long.

    Example:
        >>> wrapped("a title that would otherwise have a last line with nothing but a word").splitlines()
        ['a title that would otherwise have a', 'last line with nothing but a word']
    """
    folds = (
        textwrap.wrap(title, width, break_on_hyphens=False)
        for width in range(_LETTERS_A_LINE, _LETTERS_A_LINE // 2, -1)
    )
    # The narrowest wrapping with the fewest lines; of equals, min takes the first.
    lines = min(reversed(list(folds)), key=len)
    return "\n".join(lines)


def _add_legend(figure: Figure, handles: dict[str, Any], title: str) -> None:
    """Put a legend above the panels, in as many columns as fit the width."""
    for num_columns in range(min(_MOST_COLUMNS, len(handles)), 0, -1):
        # The figure's title becomes the legend's, because the layout would put a title over the legend.
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=num_columns,
            frameon=False,
            fontsize=10,
            title=title or None,
            title_fontsize=12,
            handlelength=2.6,
        )
        legend.get_title().set_multialignment("center")
        figure.draw_without_rendering()
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or num_columns == 1:
            figure.set_figheight(figure.get_figheight() + max(0.0, box.height / figure.dpi - _LEGEND))
            return
        legend.remove()
