"""Figures of a demonstration: accuracy against length, and bytes of state against length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ovq.eval.rows import ResultRow, format_bytes
from ovq.plots.canvas import Axes, Figure, FuncFormatter, NullLocator
from ovq.runtime.files import atomic_path

# Okabe and Ito's colours, which differ for colour-blind readers too; the dictionary sizes share a hue, darker
# for more.
_COLORS = {"full_attention": "#E69F00", "sliding_attention": "#7F7F7F"}
_MARKERS = {"full_attention": "s", "sliding_attention": "^"}
_SLOT_COLORS = ("#8CC5E8", "#3A8FC4", "#08456E")
_OTHER_COLOR = "#CC79A7"


def save_figures(rows: Sequence[ResultRow], folder: Path, *, train_length: int) -> list[Path]:
    """Draw the results into `accuracy.png` and `state.png`.

    Args:
        rows: Results of all models.
        folder: Where to put the figures; must exist.
        train_length: The longest length trained on, marked in the figures.

    Returns:
        The paths of the figures.
    """
    paths = [folder / "accuracy.png", folder / "state.png"]
    for path, draw in zip(paths, (_draw_accuracy, _draw_state), strict=True):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        draw(figure.subplots(), rows, train_length)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return paths


def _draw_accuracy(axes: Axes, rows: Sequence[ResultRow], train_length: int) -> None:
    """The share of right answers by length."""
    _draw_lines(axes, rows, lambda row: row.accuracy)
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel("right answers (share)")
    axes.set_title("In-context recall beyond the training length")
    _finish(axes, rows, train_length)


def _draw_state(axes: Axes, rows: Sequence[ResultRow], train_length: int) -> None:
    """What a model carries along, by length."""
    _draw_lines(axes, rows, lambda row: row.state_bytes)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value).replace(".0 ", " ")))
    axes.set_ylabel("bytes of state, one sequence")
    axes.set_title("Memory carried from token to token")
    _finish(axes, rows, train_length)


def _draw_lines(axes: Axes, rows: Sequence[ResultRow], value: Callable[[ResultRow], float]) -> None:
    """A line for each model and number of slots."""
    sizes = sorted({row.num_slots for row in rows if row.num_slots is not None})
    for label in dict.fromkeys(row.label for row in rows):
        line = sorted((row for row in rows if row.label == label), key=lambda row: row.length)
        color = _COLORS.get(line[0].mixer, _OTHER_COLOR)
        if line[0].num_slots is not None:
            # Spread over the hues, so that one or two sizes are told apart as well.
            place = sizes.index(line[0].num_slots) / max(1, len(sizes) - 1)
            color = _SLOT_COLORS[round(place * (len(_SLOT_COLORS) - 1))]
        axes.plot(
            [row.length for row in line],
            [value(row) for row in line],
            label=label,
            color=color,
            marker=_MARKERS.get(line[0].mixer, "o"),
            linewidth=2,
            markersize=6,
            # Lines that lie on each other at the top stay visible as rings.
            markerfacecolor="white",
            markeredgewidth=1.8,
        )


def _finish(axes: Axes, rows: Sequence[ResultRow], train_length: int) -> None:
    """Axis, mark of the training length, and a legend beside the lines, where it cannot cover them."""
    lengths = sorted({row.length for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("length (tokens)")
    axes.axvline(
        train_length, color="#BBBBBB", linestyle=":", zorder=0, label=f"trained up to {train_length}"
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
