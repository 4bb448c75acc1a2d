"""The report of all figures of a folder: one self-contained HTML file."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ovq.runtime.files import write_atomic
from ovq.runtime.units import format_bytes
from ovq_lab.eval.rows import short_number
from ovq_lab.figures.figures import FIGURES
from ovq_lab.figures.plan import Trial
from ovq_lab.figures.results import load_results
from ovq_lab.plots.draw import AXIS_NAMES, Point, points, y_name

_TEMPLATE = "page.html.jinja"

# Higher is better for all other fields.
_LESS_IS_BETTER = frozenset(
    {
        *("error", "mean_error", "slice_errors", "losses", "position_losses"),
        *("state_bytes", "microseconds_per_token"),
    }
)


class Cell(NamedTuple):
    """A table cell, with small print below it; marked if it is the best of its row."""

    text: str
    small: str = ""
    is_best: bool = False


class Table(NamedTuple):
    """A table of the page."""

    header: Sequence[str]
    body: Sequence[Sequence[Cell]]
    caption: str = ""


class Summary(NamedTuple):
    """A figure in one line: the quantity, OVQ's best result, and the best result of all."""

    what: str
    ovq: str
    best: str


def write_report(out: Path) -> Path:
    """Write `report.html` from `rows/` and `figures/` of a folder of results; returns its path."""
    order = list(FIGURES)

    def place(path: Path) -> tuple[int, str]:
        # Figures of another corpus follow the default one, whose name is a prefix of theirs.
        names = [name for name in order if f"{path.stem}-".startswith(f"{name}-")]
        return (order.index(max(names, key=len)) if names else len(order), path.stem)

    paths = sorted((out / "rows").glob("*.json"), key=place)
    if not paths:
        raise ValueError(
            f"--report: expected figures that have been made in {out}, found none; see ovq reproduce --list"
        )
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    page = templates.get_template(_TEMPLATE).render(
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        figures=[_figure(load_results(path), out / "figures") for path in paths],
    )
    path = out / "report.html"
    write_atomic(path, page.strip() + "\n")
    return path


def _figure(results: dict[str, Any], pictures: Path) -> dict[str, Any]:
    """Template variables of a figure: its results, picture and tables."""
    picture = pictures / f"{results['figure']}.png"
    tables = [_panel_table(results, panel) for panel in results["panels"]]
    if results.get("sweep"):
        tables.append(_sweep_table(results["sweep"]))
    return {
        "note": "",
        "updates": [],
        **results,
        "picture": base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else "",
        "summary": _summary(results, results["panels"][0]),
        "tables": tables,
        "models": _model_table(results["rows"]),
        "environments": [
            ", ".join(f"{name} {value}" for name, value in environment.items())
            for part in (results, *results.get("updates", []))
            for environment in part["environments"]
        ],
    }


def _summary(results: dict[str, Any], panel: dict[str, Any]) -> Summary:
    """Summary of a panel at its last x value, where mixers differ most."""
    lines = points(results, panel)
    if panel["x"] == "state_bytes":
        # Models differ in their x values.
        last, where = {label: line[-1] for label, line in lines.items()}, "most bytes"
    else:
        place = _places(panel, lines)[-1]
        last = {label: point for label, line in lines.items() for point in line if point.x == place}
        where = f"{_axis(panel['x'])}: {_value(place, panel['x'])}"
    ovq = {label: point for label, point in last.items() if "OVQ" in label}
    return Summary(f"{panel['title']}: {y_name(panel)}; {where}", _winner(ovq, panel), _winner(last, panel))


def _winner(found: dict[str, Point], panel: dict[str, Any]) -> str:
    """Label and value of the best line; empty without any that has a number."""
    best = _best([point.mean for point in found.values()], panel["y"])
    labels = (f"{label}: {_value(best, panel['y'])}" for label, point in found.items() if point.mean == best)
    return next(labels, "")


def _best(values: Iterable[float], field: str) -> float:
    """The best value of a field, other than NaN (a run that diverged); NaN if there is none.

    Example:
        >>> _best([0.5, 0.7], "accuracy"), _best([math.nan, 0.5, 0.7], "error")
        (0.7, 0.5)
    """
    numbers = [value for value in values if not math.isnan(value)]
    return (min if field in _LESS_IS_BETTER else max)(numbers, default=math.nan)


def _places(panel: dict[str, Any], lines: dict[str, list[Point]]) -> list[float | str]:
    places = list(dict.fromkeys(point.x for line in lines.values() for point in line))
    return places if panel["x"] == "slices" else sorted(places)


def _panel_table(results: dict[str, Any], panel: dict[str, Any]) -> Table:
    """Table of a panel: a row per x value, a column per line, the best of a row marked."""
    lines = points(results, panel)
    caption = f"{panel['title']}: {y_name(panel)} by {_axis(panel['x'])}"
    if panel["x"] == "state_bytes":
        # Models differ in their x values, so columns per line would be mostly empty.
        body = [
            [Cell(label), Cell(_value(point.x, "state_bytes")), _cell(point, panel["y"])]
            for label, line in lines.items()
            for point in line
        ]
        return Table(["", "bytes of state", _axis(panel["y"])], body, caption)
    body = []
    for place in _places(panel, lines):
        at_place = {label: point for label, line in lines.items() for point in line if point.x == place}
        best = _value(_best([point.mean for point in at_place.values()], panel["y"]), panel["y"])
        cells = [
            _cell(at_place[label], panel["y"], best) if label in at_place else Cell("") for label in lines
        ]
        body.append([Cell(_value(place, panel["x"])), *cells])
    return Table([_axis(panel["x"]), *lines], body, caption)


def _sweep_table(sweep: Sequence[dict[str, Any]]) -> Table:
    field = "losses" if "losses" in sweep[0] else "accuracies"
    trials = list(dict.fromkeys(trial for entry in sweep for trial in entry[field]))
    body = []
    for entry in sweep:
        name = entry["line"] + (f", tried with {slots}" if (slots := entry.get("num_slots")) else "")
        best = f"{_best(entry[field].values(), field):.4f}"
        shown = {trial: f"{value:.4f}" for trial, value in entry[field].items()}
        cells = [Cell(text := shown.get(trial, ""), is_best=text == best != "nan") for trial in trials]
        body.append([Cell(name), *cells, Cell(entry["chosen"])])
    caption = (
        f"Learning rates (and weight decay): {field} at {sweep[0]['length']} tokens, on examples that no "
        f"row comes from, seed {sweep[0]['seed']}"
    )
    return Table(["", *trials, "chosen"], body, caption)


def _model_table(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Table of the trained models: parameters, seconds, folders; None without training."""
    runs = {row["run"]: row for row in rows if "run" in row}
    if not runs:
        return None
    body = []
    for run, row in sorted(runs.items()):
        seconds = row["train_seconds"]
        cells = (
            run,
            row["line"],
            Trial(learning_rate=row["learning_rate"], weight_decay=row["weight_decay"]).label,
            f"{row['num_parameters']}",
            "interrupted" if seconds is None else f"{seconds:.0f}",
        )
        body.append([Cell(text) for text in cells])
    return Table(["run", "first line with it", "learning rate", "parameters", "seconds of training"], body)


def _cell(point: Point, field: str, best: str | None = None) -> Cell:
    """Cell with the mean and the range over seeds; marked if its text equals the best of its row."""
    text = _value(point.mean, field)
    # Of NaN and numbers, which end of the range is NaN depends on their order.
    is_one = point.low == point.high or math.isnan(point.mean)
    small = "" if is_one else f"{_value(point.low, field)} to {_value(point.high, field)}"
    return Cell(text, small, is_best=text == best != "nan")


def _value(value: float | str, field: str) -> str:
    if isinstance(value, str):
        return value
    if field == "state_bytes":
        return format_bytes(value)
    if field in ("length", "num_slots", "task.num_functions", "positions"):
        return short_number(value)
    if field == "position_losses":
        return f"{value:.4f}"
    if field in ("accuracy", "slices", "mean_error", "slice_errors", "error", "choice", "generated"):
        return f"{value:.3f}"
    return f"{value:.3g}"


def _axis(field: str) -> str:
    return AXIS_NAMES.get(field, field.removeprefix("task.").replace("_", " "))
