"""Figures of a demonstration: accuracy against length, and bytes of state against length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ovq.runtime.units import format_bytes
from ovq_lab.eval.rows import ResultRow
from ovq_lab.plots.canvas import Axes, FuncFormatter
from ovq_lab.plots.panels import length_axis, mark_training, new_panels, save
from ovq_lab.plots.style import line_styles, style_name

_RULES = ("existing", "nearest")
# Between the names at the ends of lines, as a share of all answers.
_LEAST_GAP = 0.06


def save_figures(
    rows: Sequence[ResultRow], folder: Path, *, train_length: int, prefix: str = ""
) -> list[Path]:
    """Draw the results into `accuracy.png` and `state.png`.

    Args:
        rows: Results of all models.
        folder: Where to put the figures; must exist.
        train_length: The longest length of the training, marked in the figures.
        prefix: Beginning of the figures' file names.

    Returns:
        The paths of the figures.
    """
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
    """The share of right answers by length, each line with its name at its end."""
    sizes = {merge: sorted({x.num_slots or 0 for x in rows if x.merge == merge}) for merge in _RULES}
    # The largest dictionary lies on full attention, and with larger ones rules come to lie on each other.
    shown = {"existing": sizes["existing"][:1], "nearest": sizes["nearest"][:-1] or sizes["nearest"]}
    rows = [row for row in rows if row.merge not in shown or row.num_slots in shown[row.merge]]
    _draw_lines(axes, rows, lambda row: row.accuracy)
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("right answers (share)")
    lines = sorted(axes.get_lines(), key=lambda line: np.asarray(line.get_ydata())[-1])
    below = -np.inf
    for line in lines:
        x, y = (float(np.asarray(data)[-1]) for data in line.get_data())
        below = max(y, below + _LEAST_GAP)
        name = str(line.get_label())
        axes.annotate(
            name,
            (x, below),
            xytext=(8, 0),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            fontsize=10,
        )
        # Its name is at the line, not in the legend.
        line.set_label(f"_{name}")


def _draw_state(axes: Axes, rows: Sequence[ResultRow]) -> None:
    """The bytes that a model carries from token to token, by length."""
    _draw_lines(axes, rows, lambda row: row.state_bytes)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value).replace(".0 ", " ")))
    axes.set_ylabel("bytes of state, one sequence")


def _draw_lines(axes: Axes, rows: Sequence[ResultRow], value: Callable[[ResultRow], float]) -> None:
    """One line for each model and number of slots."""
    styles = line_styles({row.label: (style_name(row.mixer, row.merge), row.num_slots) for row in rows})
    for label, style in styles.items():
        line = sorted((row for row in rows if row.label == label), key=lambda row: row.length)
        axes.plot([row.length for row in line], [value(row) for row in line], label=label, **style.options())


def _finish(axes: Axes, rows: Sequence[ResultRow], train_length: int) -> None:
    """Label the axes, and mark the training length."""
    lengths = sorted({row.length for row in rows})
    length_axis(axes, lengths, [str(length) for length in lengths])
    axes.set_xlabel("length (tokens)")
    mark_training(axes, train_length, f"trained up to {train_length}")
