"""Figures of a demonstration: accuracy against length, and bytes of state against length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from ovq.runtime.units import format_bytes
from ovq_lab.eval.rows import ResultRow
from ovq_lab.plots.canvas import Axes, FuncFormatter
from ovq_lab.plots.panels import length_axis, mark_training, new_panels, save
from ovq_lab.plots.style import row_styles

# Smallest distance between the names at the ends of lines, in accuracy.
_LEAST_GAP = 0.06


def save_figures(
    rows: Sequence[ResultRow], folder: Path, *, train_length: int, prefix: str = ""
) -> list[Path]:
    """Draw the results into `accuracy.png` and `state.png`, with `prefix` before the names, and mark the
    longest training length."""
    paths = []
    for name, title, draw in (
        ("accuracy", "In-context recall beyond the training length", _draw_accuracy),
        ("state", "Memory carried from token to token", _draw_state),
    ):
        figure, [axes] = new_panels(1, height=3.6)
        draw(axes, rows)
        _finish(axes, rows, train_length)
        paths.append(folder / f"{prefix}{name}.png")
        save(figure, paths[-1], title=title)
    return paths


def _draw_accuracy(axes: Axes, rows: Sequence[ResultRow]) -> None:
    """Draw accuracy by length, with the name of each line at its end."""
    _draw_lines(axes, rows, lambda row: row.accuracy)
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("right answers (share)")
    lines = sorted(axes.get_lines(), key=lambda line: np.asarray(line.get_ydata())[-1])
    ends = [[float(np.asarray(data)[-1]) for data in line.get_data()] for line in lines]
    for line, (x, _), height in zip(lines, ends, _apart([y for _, y in ends]), strict=True):
        name = str(line.get_label())
        axes.annotate(
            name,
            (x, height),
            xytext=(8, 0),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            fontsize=10,
            # Otherwise names above the axes would not be drawn.
            annotation_clip=False,
        )
        # The underscore keeps the line out of the legend, as its name is at its end.
        line.set_label(f"_{name}")


def _apart(heights: Sequence[float]) -> list[float]:
    """The heights at least `_LEAST_GAP` apart that are nearest to the given ascending ones.

    Example:
        >>> [round(height, 3) for height in _apart([0.0, 0.5, 0.5, 0.53])]
        [0.0, 0.45, 0.51, 0.57]
    """
    # Groups of touching names: the position of the lowest is the mean of what each member would choose.
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and _lowest(groups[-1]) < _lowest(groups[-2]) + _LEAST_GAP * len(groups[-2]):
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_lowest(group) + _LEAST_GAP * i for group in groups for i in range(len(group))]


def _lowest(group: Sequence[float]) -> float:
    return fmean(group) - _LEAST_GAP * (len(group) - 1) / 2


def _draw_state(axes: Axes, rows: Sequence[ResultRow]) -> None:
    """Draw bytes of state by length."""
    _draw_lines(axes, rows, lambda row: row.state_bytes)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value).replace(".0 ", " ")))
    axes.set_ylabel("bytes of state, one sequence")


def _draw_lines(axes: Axes, rows: Sequence[ResultRow], value: Callable[[ResultRow], float]) -> None:
    """Draw one line for each model and number of slots."""
    for label, style in row_styles(rows).items():
        line = sorted((row for row in rows if row.label == label), key=lambda row: row.length)
        axes.plot([row.length for row in line], [value(row) for row in line], label=label, **style.options())


def _finish(axes: Axes, rows: Sequence[ResultRow], train_length: int) -> None:
    """Label the axes, and mark the training length."""
    lengths = sorted({row.length for row in rows})
    length_axis(axes, lengths, [str(length) for length in lengths])
    axes.set_xlabel("length (tokens)")
    mark_training(axes, train_length, f"trained up to {train_length}")
