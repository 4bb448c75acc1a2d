"""All that has been run on one page: a single HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ovq.eval.rows import format_bytes
from ovq.research.reproduce.draw import AXIS_NAMES, Point, points, short_number, y_name
from ovq.research.reproduce.figures import FIGURES
from ovq.research.reproduce.plan import Trial
from ovq.research.reproduce.results import load_results
from ovq.runtime.files import write_atomic

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 68em; margin: 2em auto; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5em; border-top: 1px solid #ddd; padding-top: 1em; }
table { border-collapse: collapse; margin: 0.7em 0 1.4em; font-size: 13px; }
th, td { border-bottom: 1px solid #ddd; padding: 0.25em 0.7em; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #999; }
td small { color: #777; display: block; font-size: 11px; } caption { text-align: left; font-weight: 600; }
code { background: #f3f3f3; padding: 0.1em 0.3em; } img { max-width: 100%; } .wide { overflow-x: auto; }
"""


def write_report(out: Path) -> Path:
    """Write `report.html` from all rows and figures in a folder of results.

    Args:
        out: The folder; holds `rows/` and `figures/`.

    Returns:
        The path of the page.

    Raises:
        ValueError: If there are no rows, or a file of them cannot be read.
        OSError: If the page cannot be written.
    """
    order = list(FIGURES)

    def place(path: Path) -> tuple[int, str]:
        # Those of a chosen corpus follow the usual one.
        name = path.stem.split("-")[0]
        return (order.index(name) if name in order else len(order), path.stem)

    paths = sorted((out / "rows").glob("*.json"), key=place)
    if not paths:
        raise ValueError(
            f"--report: expected figures that have been made in {out}, found none; see ovq reproduce --list"
        )
    everything = [load_results(path) for path in paths]
    sections = [_section(results, out / "figures" / f"{results['figure']}.png") for results in everything]
    contents = "".join(
        f'<li><a href="#{_text(each["figure"])}">{_text(each["title"])}</a></li>' for each in everything
    )
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>ovq: what was measured</title>'
        f"<style>{_STYLE}</style></head><body><h1>OVQ attention: what was measured</h1>"
        f"<p>Written {now}. Tables and figures show means over the seeds; small numbers and bars, the lowest "
        "and the highest seed. Times were taken while other runs were going on beside, so only large ratios "
        f"mean anything.</p><ul>{contents}</ul>{''.join(sections)}</body></html>\n"
    )
    path = out / "report.html"
    write_atomic(path, page)
    return path


def _section(results: dict[str, Any], picture: Path) -> str:
    """A figure, its tables, and how it came about."""
    parts = [f'<h2 id="{_text(results["figure"])}">{_text(results["title"])}</h2>']
    parts.append(
        f"<p><code>{_text(results['command'])}</code><br>Seeds {', '.join(map(str, results['seeds']))}.</p>"
    )
    if results.get("note"):
        parts.append(f"<p>{_text(results['note'])}</p>")
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f'<p><img alt="{_text(results["title"])}" src="data:image/png;base64,{data}"></p>')
    parts += [_panel_table(results, panel) for panel in results["panels"]]
    if results.get("sweep"):
        parts.append(_sweep_table(results["sweep"]))
    # A study trains nothing.
    parts += [_model_table(results["rows"])] if "sweep" in results else []
    parts.append(_environments(results["environments"]))
    return "".join(parts)


def _panel_table(results: dict[str, Any], panel: dict[str, Any]) -> str:
    """The numbers of a panel: a row for each line, a column for each place."""
    lines = points(results, panel)
    places = list(dict.fromkeys(point.x for line in lines.values() for point in line))
    caption = f"{panel['title']}: {y_name(panel)} by {_axis(panel['x'])}"
    if panel["x"] == "state_bytes":
        # Each model has places of its own: two rows a line would be mostly empty columns.
        body = [
            [label, _value(point.x, "state_bytes"), _cell(point, panel["y"])]
            for label, line in lines.items()
            for point in line
        ]
        return _table(["", "bytes of state", _axis(panel["y"])], body, caption)
    if panel["x"] != "slices":
        places.sort()
    body = []
    for label, line in lines.items():
        by_place = {point.x: point for point in line}
        body.append(
            [label, *(_cell(by_place[place], panel["y"]) if place in by_place else "" for place in places)]
        )
    return _table(["", *(_value(place, panel["x"]) for place in places)], body, caption)


def _sweep_table(sweep: Sequence[dict[str, Any]]) -> str:
    trials = list(dict.fromkeys(trial for entry in sweep for trial in entry["accuracies"]))
    body = [
        [
            entry["line"] + (f", tried with {slots}" if (slots := entry.get("num_slots")) else ""),
            *(
                f"{found:.4f}" if (found := entry["accuracies"].get(trial)) is not None else ""
                for trial in trials
            ),
            entry["chosen"],
        ]
        for entry in sweep
    ]
    caption = (
        f"Learning rates (and weight decay): accuracy at {sweep[0]['length']} tokens of other data than the "
        f"tests', seed {sweep[0]['seed']}"
    )
    return _table(["", *trials, "chosen"], body, caption)


def _model_table(rows: Sequence[dict[str, Any]]) -> str:
    """What was trained: parameters, seconds, folders."""
    runs = {row["run"]: row for row in rows}
    body = []
    for run, row in sorted(runs.items()):
        seconds = row["train_seconds"]
        body.append(
            [
                run,
                row["line"],
                Trial(learning_rate=row["learning_rate"], weight_decay=row["weight_decay"]).label,
                f"{row['num_parameters']}",
                "interrupted" if seconds is None else f"{seconds:.0f}",
            ]
        )
    table = _table(
        ["run", "first line with it", "learning rate", "parameters", "seconds of training"], body, ""
    )
    return f"<details><summary>{len(body)} trained models</summary>{table}</details>"


def _environments(environments: Iterable[dict[str, Any]]) -> str:
    items = "".join(
        "<li>" + _text(", ".join(f"{name} {value}" for name, value in each.items())) + "</li>"
        for each in environments
    )
    return f"<p>Made with:</p><ul>{items}</ul>"


def _cell(point: Point, field: str) -> str:
    if point.low == point.high:
        return _value(point.mean, field)
    return f"{_value(point.mean, field)}\n{_value(point.low, field)} to {_value(point.high, field)}"


def _value(value: float | str, field: str) -> str:
    """A value of a field for people."""
    if isinstance(value, str):
        return value
    if field == "state_bytes":
        return format_bytes(value)
    if field in ("length", "num_slots", "task.num_functions", "positions"):
        return short_number(value)
    if field == "position_losses":
        return f"{value:.4f}"
    if field in ("accuracy", "slices", "mean_error", "slice_errors", "error", "choice"):
        return f"{value:.3f}"
    return f"{value:.3g}"


def _axis(field: str) -> str:
    return AXIS_NAMES.get(field, field.removeprefix("task.").replace("_", " "))


def _table(header: Sequence[str], body: Sequence[Sequence[str]], caption: str) -> str:
    """An HTML table; a second line of a cell becomes small print."""
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    lines = "".join("<tr>" + "".join(f"<td>{_small(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return (
        f'<div class="wide"><table><caption>{_text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _small(cell: str) -> str:
    first, _, rest = cell.partition("\n")
    return _text(first) + (f"<small>{_text(rest)}</small>" if rest else "")


def _text(value: str) -> str:
    return html.escape(str(value))
