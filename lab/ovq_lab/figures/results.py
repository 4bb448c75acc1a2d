"""The results file of a figure, in which each field of a line, a run or an evaluation is written once.

    {
     "figure": "recall",
     ...
     "shared": {"task.name": "recall", "task.vocab_size": 130, "slice_errors.names": [], ...},
     "runs": [
      ["run", "mixer", "seed", "learning_rate", ...],
      ["recall-ovq-seed0-0123456789", "ovq", 0, 0.008, ...],
      ...
     ],
     "evaluations": [
      ["length", "task.num_queries", "slices.names", ...],
      [256, 42, ["distance 4-7", ...], ...],
      ...
     ],
     "rows": [
      ["run", "evaluation", "num_slots", "accuracy", "slices.values", ...],
      [1, 1, 64, 0.9864211309523809, [1.0, ...], ...],
      ...
     ],
     "lines": [
      ["line", "group", "first", "last"],
      ["OVQ, 64 slots", "", 1, 15],
      ...
     ]
    }

A table is a list whose first entry names the columns; the other entries are numbered from 1. A field that has
the same value in all rows stands in `shared`. A field of a nested dict is named `"task.length"`; a dict of
values per slice or position becomes a list of names and a list of values. A line has the rows from `first` to
`last`; it has several entries if its rows do not follow each other. Lines can have rows in common.

The rest of the code sees rows as dicts with all fields: `load_results` joins the tables of `save_results`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovq.runtime.files import write_atomic

Row = dict[str, Any]
Table = list[list[Any]]

_OF_LINES = ("line", "group", "stream", "memory")
_OF_RUNS = frozenset(
    {
        *("run", "mixer", "seed", "learning_rate", "weight_decay"),
        *("train_length", "train_seconds", "num_parameters"),
    }
)
_OF_EVALUATIONS = frozenset(
    {
        *("length", "depth", "num_examples", "num_questions", "block_size"),
        *("haystack", "value", "num_distractors", "task", "source"),
        # Names of slices and positions.
        "names",
    }
)
# Fields that map names to values; the order of the names is kept.
_BY_NAME = (
    *("slices", "slice_errors", "position_losses"),
    *("heads_share", "slot_counts", "oldest", "mean_position"),
)

_EXPECTED = ("figure", "title", "rows", "panels", "seeds", "command", "environments")


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results of a figure, whose `rows` are dicts, atomically."""
    header = {name: value for name, value in results.items() if name != "rows"}
    parts = [
        f" {json.dumps(name)}: {_in_lines(value)}"
        for name, value in (header | _taken_apart(results["rows"])).items()
    ]
    write_atomic(path, "{\n" + ",\n".join(parts) + "\n}\n")


def load_results(path: Path) -> dict[str, Any]:
    """Load a file of `save_results`; each row is a dict with all fields."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for name in _EXPECTED:
            results[name]
        return _joined(results) if "lines" in results else results
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: expected the rows of a figure, found something else ({error})") from error


def _numbered(rows: Sequence[Row], columns: list[str]) -> tuple[Table, list[int]]:
    """A table of these columns without duplicate rows, and the number of the entry for each row."""
    # JSON text, in which 1, 1.0 and True differ.
    texts = [json.dumps([row[name] for name in columns]) for row in rows]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts), start=1)}
    return [columns, *map(json.loads, numbers)], [numbers[text] for text in texts]


def _taken_apart(rows: Sequence[Row]) -> dict[str, Any]:
    """Split rows into shared fields and tables; rows with different fields are written as they are."""
    flat = [_flattened(row) for row in rows]
    if not flat or any(row.keys() != flat[0].keys() for row in flat):
        return {"rows": list(rows)}
    # The name of the run first, long lists last.
    fields = sorted(flat[0], key=lambda name: (name != "run", name.endswith(".values"), name))
    of_lines = [name for name in _OF_LINES if name in fields]
    is_shared = {name: len({json.dumps(row[name]) for row in flat}) == 1 for name in fields}
    left = [name for name in fields if name not in of_lines and not is_shared[name]]
    parts: dict[str, Table] = {}
    # Rows measured without training have no run and no evaluation.
    for part, known in (("run", _OF_RUNS), ("evaluation", _OF_EVALUATIONS)) if "run" in fields else ():
        if columns := [name for name in left if not known.isdisjoint(name.split("."))]:
            parts[part], numbers = _numbered(flat, columns)
            flat = [row | {part: number} for row, number in zip(flat, numbers, strict=True)]
    in_parts = {name for table in parts.values() for name in table[0]}
    measured, numbers = _numbered(flat, [*parts, *(name for name in left if name not in in_parts)])
    lines: Table = []
    for row, number in zip(flat, numbers, strict=True):
        line = [row[name] for name in of_lines]
        if lines and lines[-1][:-2] == line and lines[-1][-1] == number - 1:
            lines[-1][-1] = number
        else:
            lines.append([*line, number, number])
    return {
        "shared": {name: flat[0][name] for name in fields if is_shared[name] and name not in of_lines},
        **{f"{part}s": table for part, table in parts.items()},
        "rows": measured,
        "lines": [[*of_lines, "first", "last"], *lines],
    }


def _joined(results: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_taken_apart`."""
    parts = {part: _dicts(results[f"{part}s"]) for part in ("run", "evaluation") if f"{part}s" in results}
    rows = []
    for row in _dicts(results["rows"]):
        of_parts = [table[row.pop(part) - 1] for part, table in parts.items()]
        rows.append(row | {name: value for each in of_parts for name, value in each.items()})
    joined = []
    for line in _dicts(results["lines"]):
        first, last = line.pop("first"), line.pop("last")
        joined += [_nested(results["shared"] | line | rows[number - 1]) for number in range(first, last + 1)]
    taken = ("shared", "runs", "evaluations", "lines")
    return {name: value for name, value in results.items() if name not in taken} | {"rows": joined}


def _dicts(table: Table) -> list[Row]:
    """The rows of a table as dicts by column name."""
    columns, *rows = table
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _flattened(row: Row) -> Row:
    """A row without nested dicts: fields such as `"task.length"`, `"slices.names"`, `"slices.values"`."""
    flat: Row = {}
    for field, value in row.items():
        if field in _BY_NAME:
            value = {"names": list(value), "values": list(value.values())}
        parts = value if isinstance(value, dict) and value else {}
        flat |= {f"{field}.{name}": part for name, part in parts.items()} or {field: value}
    return flat


def _nested(flat: Row) -> Row:
    """The inverse of `_flattened`."""
    row: Row = {}
    for name, value in flat.items():
        field, _, part = name.partition(".")
        if part:
            row.setdefault(field, {})[part] = value
        else:
            row[field] = value
    for field in _BY_NAME:
        if field in row:
            row[field] = dict(zip(row[field]["names"], row[field]["values"], strict=True))
    return row


def _in_lines(value: Any) -> str:
    """JSON with a line per entry of a list or dict of lists and dicts, for readable diffs."""
    match value:
        case list() if any(isinstance(entry, list | dict) for entry in value):
            opened, closed = "[", "]"
            entries = [_as_line(entry) for entry in value]
        case dict() if any(isinstance(entry, list | dict) for entry in value.values()):
            opened, closed = "{", "}"
            entries = [f"{json.dumps(name)}: {_as_line(entry)}" for name, entry in value.items()]
        case _:
            return json.dumps(value)
    return f"{opened}\n  " + ",\n  ".join(entries) + f"\n {closed}"


def _as_line(entry: Any) -> str:
    # Spaces between cells would be a tenth of the file.
    return json.dumps(entry, separators=(",", ":") if isinstance(entry, list) else None)
