"""Drawing a figure from its rows: means over seeds, with error bars from the lowest to the highest seed."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ovq.runtime.units import format_bytes
from ovq_lab.eval.rows import LOGN, ResultRow, short_number
from ovq_lab.plots.canvas import Axes, Figure, FuncFormatter, LogLocator, NullLocator
from ovq_lab.plots.panels import WIDTH, error_bars, length_axis, mark_training, new_panels, save, wrapped
from ovq_lab.plots.style import PAIRS, Style, line_styles, style_name

# With more ticks, labels such as "256 KiB" would touch each other.
_MOST_TICKS = 6
_MOST_NAMES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes: a field of the rows against another, for the lines of a group.

    Attributes:
        x: A field of the rows, or a number of their task as `"task.NAME"`; `"slices"` for the slices of the
            task's questions, `"positions"` for the parts of a text.
        y: A field of the rows; with `x="slices"` one that has a value for each slice: `"slices"` for the
            accuracy, `"slice_errors"` for the error; with `x="positions"` it is `"position_losses"`.
        at_length: Show only rows of this length; `None` for all.
        relative_to: Show values in per cent above those of the line of this label, seed by seed; `None` for
            the values themselves.
    """

    title: str
    x: str = "length"
    y: str = "accuracy"
    group: str = ""
    at_length: int | None = None
    relative_to: str | None = None


class Point(NamedTuple):
    """One point of a line: mean, lowest and highest value over seeds."""

    x: float | str
    mean: float
    low: float
    high: float


AXIS_NAMES = {
    "length": "length (tokens)",
    "num_slots": "slots of the dictionary at test time",
    "state_bytes": "bytes of state, one sequence",
    "accuracy": "right answers (share)",
    "error": "error relative to exact attention",
    "mean_error": "mean absolute error",
    "slice_errors": "mean absolute error",
    "task.num_functions": "functions",
    "microseconds_per_token": "test time (µs per token)",
    "seconds": "time",
    "peak_bytes": "bytes",
    "learning_rate": "learning rate",
    "slices": "questions",
    "positions": "position (tokens)",
    "position_losses": "loss (nats per token)",
    "generated": "values said in full (share)",
    "token_accuracy": "tokens of values ranked first (share)",
    "choice": "values told from others (share)",
    "own_share": "share of the questions",
    "own_accuracy": "right answers (share)",
    "shared_accuracy": "right answers (share)",
    "slot_counts": "share of the slots",
    "oldest": "share of the slots",
    "mean_position": "share of the slots",
}
"""Axis labels of row fields; other fields are shown by their names."""

# Values of `x` for which a row holds a dict of several points, and the parser of its keys.
_IN_PARTS: dict[str, Callable[[str], float | str]] = {"slices": str, "positions": int}

_IS_LOGARITHMIC = frozenset({"state_bytes", "peak_bytes", "microseconds_per_token", "seconds", "error"})

# A memory that is measured without a model has the style of the mixer that uses it.
_MIXERS_OF_MEMORIES = {
    "OVQ": "ovq",
    "OVQ, nearest": PAIRS,
    "static VQ": "vq",
    "linear attention": "linear_attention",
    "delta rule": "gated_deltanet",
    "window + sinks": "sink_attention",
}


_Values = dict[float | str, dict[int, float]]
"""The values of a line by x and seed."""


def field_of(row: dict[str, Any], path: str) -> Any:
    """A field of a row, or of a part of it as `"part.field"`."""
    return functools.reduce(operator.getitem, path.split("."), row)


def points(results: dict[str, Any], panel: dict[str, Any]) -> dict[str, list[Point]]:
    """The points of a panel, from left to right, by the label of the line."""
    values: dict[str, _Values] = {}
    for row in results["rows"]:
        if row["group"] != panel["group"] or panel["at_length"] not in (None, row["length"]):
            continue
        by_x = values.setdefault(row["line"], {})
        if panel["x"] in _IN_PARTS:
            found = {_IN_PARTS[panel["x"]](place): value for place, value in row[panel["y"]].items()}
        else:
            found = {field_of(row, panel["x"]): field_of(row, panel["y"])}
        for x, value in found.items():
            # No data, such as the accuracy on questions that did not occur.
            if value is None:
                continue
            by_x.setdefault(x, {})[row["seed"]] = value
    if (base := panel.get("relative_to")) is not None:
        values = {label: _per_cent_above(values.get(base, {}), by_x) for label, by_x in values.items()}
    lines = {}
    for label, by_x in values.items():
        places = list(by_x) if panel["x"] == "slices" else sorted(by_x)
        seeds = [list(by_x[x].values()) for x in places]
        lines[label] = [
            Point(x, sum(each) / len(each), min(each), max(each))
            for x, each in zip(places, seeds, strict=True)
        ]
    return lines


def _per_cent_above(base: _Values, values: _Values) -> _Values:
    """Per cent by which values exceed those of `base` with the same x and seed; others are left out."""
    found = {
        x: {
            seed: 100 * (value / base[x][seed] - 1)
            for seed, value in by_seed.items()
            if seed in base.get(x, {})
        }
        for x, by_seed in values.items()
    }
    return {x: by_seed for x, by_seed in found.items() if by_seed}


def save_figure(results: dict[str, Any], path: Path) -> None:
    """Draw the panels of a figure into a PNG file, one below the other; `results` is from `load_results`."""
    models = models_of(results)
    styles = _styles(models)
    canvas, places = new_panels(len(results["panels"]))
    for axes, panel in zip(places, results["panels"], strict=True):
        _draw_panel(axes, results, panel, styles)
    save(canvas, path, title=results["title"], first=list(models))


def save_demo_figures(
    rows: Sequence[ResultRow], folder: Path, *, train_length: int, prefix: str = ""
) -> list[Path]:
    """Draw the results of a demonstration into `accuracy.png` and `state.png`, their names after `prefix`."""
    common = {"group": "", "seed": 0, "train_length": train_length}
    fields = [dataclasses.asdict(row) | common | {"line": row.label} for row in rows]
    paths = []
    for name, y, title in (
        ("accuracy", "accuracy", "In-context recall beyond the training length"),
        ("state", "state_bytes", "Memory carried from token to token"),
    ):
        paths.append(folder / f"{prefix}{name}.png")
        panel = dataclasses.asdict(Panel(title="", y=y))
        save_figure({"title": title, "panels": [panel], "rows": fields}, paths[-1])
    return paths


def _styles(models: dict[str, tuple[str, int | None]]) -> dict[str, Style]:
    """The style of each line. A model with and without scaled logits has one style, but dashed without."""
    endings = {label: label.removesuffix(f", {LOGN}") for label in models if label.endswith(f", {LOGN}")}
    scaled = {label: plain for label, plain in endings.items() if plain in models}
    styles = line_styles({label: model for label, model in models.items() if label not in scaled})
    for label, plain in scaled.items():
        styles[label] = dataclasses.replace(styles[plain], line="-")
    return {
        label: dataclasses.replace(styles[label], line="--") if label in scaled.values() else styles[label]
        for label in models
    }


def models_of(results: dict[str, Any]) -> dict[str, tuple[str, int | None]]:
    """Mixer, and largest number of slots in the evaluations, by the label of the line."""
    models: dict[str, tuple[str, int | None]] = {}
    for row in results["rows"]:
        mixer = row.get("mixer") or _MIXERS_OF_MEMORIES.get(row["line"], row["line"])
        # Files of earlier versions lack the merge rule.
        mixer = style_name(mixer, row.get("merge"))
        _, known = models.get(row["line"], (mixer, None))
        slots = [number for number in (known, row.get("num_slots")) if number is not None]
        models[row["line"]] = (mixer, max(slots, default=None))
    return models


def _draw_panel(axes: Axes, results: dict[str, Any], panel: dict[str, Any], styles: dict[str, Style]) -> None:
    lines = points(results, panel)
    places = list(dict.fromkeys(point.x for line in lines.values() for point in line))
    for label, line in lines.items():
        x: list[Any] = [places.index(point.x) if panel["x"] == "slices" else point.x for point in line]
        error_bars(
            axes,
            x,
            [(point.mean, point.low, point.high) for point in line],
            label=label,
            **styles[label].options(),
        )
    axes.set_title(wrapped(panel["title"]), fontsize=11)
    # Shares of slots are not by slices of the questions; their titles say by what.
    if panel["x"] != "slices" or panel["y"] in ("slices", "slice_errors"):
        axes.set_xlabel(AXIS_NAMES.get(panel["x"], panel["x"].removeprefix("task.").replace("_", " ")))
    axes.set_ylabel(y_name(panel))
    if panel["y"] in ("accuracy", "slices", "choice"):
        axes.set_ylim(-0.03, 1.05)
    elif panel["y"] in ("mean_error", "slice_errors"):
        # With 0 among the values there is room for markers above the highest, however close the others are.
        axes.dataLim.update_from_data_y([0], ignore=False)
        axes.set_ylim(bottom=0)
    if panel["x"] == "slices":
        # More names would touch each other if horizontal.
        slanted: dict[str, Any] = {"rotation": 35, "ha": "right"} if len(places) > _MOST_NAMES else {}
        axes.set_xticks(range(len(places)), [str(place) for place in places], fontsize=9, **slanted)
        axes.margins(x=0.1)
    else:
        _scale(axes, "x", panel["x"], sorted(_numbers(places)))
    if panel["y"] in _IS_LOGARITHMIC:
        _scale(axes, "y", panel["y"])
    if panel["x"] in ("length", "positions"):
        of_panel = [row for row in results["rows"] if row["group"] == panel["group"]]
        train_lengths = {row["train_length"] for row in of_panel if "train_length" in row}
        for length in train_lengths:
            mark_training(axes, length, "longest in training")


def y_name(panel: dict[str, Any]) -> str:
    """The label of a panel's y axis."""
    if (base := panel.get("relative_to")) is not None:
        return f"% above {base}"
    return AXIS_NAMES.get(panel["y"], panel["y"])


def save_heat_maps(results: dict[str, Any], path: Path, *, row_name: str = "") -> None:
    """Draw a map of shares for each line into a PNG file, framed in the colour of its mixer: panels from top
    to bottom, their x values from left to right."""
    models, panels = models_of(results), results["panels"]
    found = [points(results, panel) for panel in panels]
    columns = sorted({point.x for lines in found for line in lines.values() for point in line})
    height = 0.55 + 0.27 * len(panels)
    figure = Figure(figsize=(WIDTH, height * len(models) + 1.5), layout="constrained")
    places = figure.subplots(len(models), 1, squeeze=False).flatten()
    styles = line_styles(models)
    for axes, label in zip(places, models, strict=True):
        cells = [{point.x: point.mean for point in lines.get(label, ())} for lines in found]
        grid = np.array([[row.get(column, math.nan) for column in columns] for row in cells])
        image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for y, x in zip(*np.nonzero(~np.isnan(grid)), strict=True):
            # Dark text on light cells, and light text on dark ones.
            color = "black" if grid[y, x] > 0.6 else "white"
            axes.text(x, y, f"{grid[y, x]:.2f}", ha="center", va="center", color=color, fontsize=9)
        axes.set_xticks(range(len(columns)), [short_number(column) for column in _numbers(columns)])
        axes.set_yticks(range(len(panels)), [panel["title"] for panel in panels])
        axes.set_title(label, fontsize=11)
        axes.spines[:].set(color=styles[label].color, linewidth=2.5)
    bar = figure.colorbar(
        image, ax=places.tolist(), location="bottom", fraction=0.05, aspect=40, pad=0.01 + 0.06 / len(models)
    )
    bar.set_label(y_name(panels[0]), fontsize=10)
    places[-1].set_xlabel(AXIS_NAMES[panels[0]["x"]], fontsize=10)
    if row_name:
        figure.supylabel(row_name, fontsize=10)
    figure.suptitle(wrapped(results["title"]), fontsize=12)
    save(figure, path)


def _numbers(places: Iterable[float | str]) -> list[float]:
    """The x values that are numbers, as all are except names of slices."""
    return [place for place in places if not isinstance(place, str)]


def _scale(axes: Axes, which: str, field: str, places: Sequence[float] = ()) -> None:
    """Set a log2 scale, with ticks at the measured values if they are few."""
    if which == "x" and (not places or places[0] <= 0):
        return
    axis = axes.xaxis if which == "x" else axes.yaxis
    # Bytes differ between models; other fields have the requested values.
    if which == "x" and field != "state_bytes":
        length_axis(axes, places, [short_number(place) for place in places])
        return
    base = 10 if field == "seconds" else 2
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=base)
    axis.set_major_locator(LogLocator(base=base, numticks=_MOST_TICKS))
    axis.set_minor_locator(NullLocator())
    formats = {"state_bytes": format_bytes, "peak_bytes": format_bytes, "seconds": format_seconds}
    formatted = formats.get(field, short_number)
    axis.set_major_formatter(FuncFormatter(lambda x, _: formatted(x).replace(".0 ", " ")))


def format_seconds(seconds: float) -> str:
    """Format a time for display.

    Example:
        >>> format_seconds(0.0000321), format_seconds(0.0321), format_seconds(3.21)
        ('32 us', '32.1 ms', '3.21 s')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
