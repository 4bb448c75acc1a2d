"""The file of a figure's results: what belongs to a run or a question once, and one row a line.

    {
     "figure": "recall",
     ...
     "runs": {
      "recall-ovq-seed0-0123456789": {"mixer": "ovq", "seed": 0, "learning_rate": 0.008, ...},
      ...
     },
     "questions": [
      {"num_examples": 256, "task": {...}, "slices": ["distance 4-7", ...]},
      ...
     ],
     "columns": ["line", "group", "run", "question", "num_slots", "length", "accuracy", ...],
     "rows": [
      ["OVQ, 64 slots", "", "recall-ovq-seed0-0123456789", 0, 64, 256, 0.9864211309523809, ...],
      ...
     ]
    }

Everyone else sees rows as dicts that hold all of it: `load_results` joins what `save_results` takes apart.
Files of earlier versions, whose rows are written out in full, are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ovq.runtime.files import write_atomic

Row = dict[str, Any]

_OF_RUNS = (
    *("mixer", "seed", "learning_rate", "weight_decay"),
    *("train_length", "train_seconds", "num_parameters"),
)
_OF_QUESTIONS = (
    *("num_examples", "task", "source", "block_size"),
    *("haystack", "value", "num_distractors"),
)
# Values by name, whose names are those of the question.
_IN_PARTS = ("slices", "slice_errors", "position_losses")

_EXPECTED = ("figure", "title", "rows", "panels", "seeds", "command", "environments")


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results of a figure in one piece.

    Args:
        path: Where to; its folder must exist.
        results: What a figure has, with its `rows` as dicts.

    Raises:
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> rows = [{"line": "OVQ", "run": "a", "seed": 0, "length": n, "accuracy": 1.0} for n in (1, 2)]
        >>> results = dict.fromkeys(("figure", "title", "panels", "seeds", "command", "environments"), "")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "recall.json"
        ...     save_results(path, {**results, "rows": rows})
        ...     print(path.read_text().partition('"environments": "",')[2])
        ...     load_results(path)["rows"] == rows
        <BLANKLINE>
         "runs": {
          "a": {"seed": 0}
         },
         "columns": ["line", "run", "length", "accuracy"],
         "rows": [
          ["OVQ", "a", 1, 1.0],
          ["OVQ", "a", 2, 1.0]
         ]
        }
        <BLANKLINE>
        True
    """
    header = {name: value for name, value in results.items() if name != "rows"}
    parts = [
        f" {json.dumps(name)}: {_in_lines(value)}" for name, value in (header | _taken_apart(results)).items()
    ]
    write_atomic(path, "{\n" + ",\n".join(parts) + "\n}\n")


def load_results(path: Path) -> dict[str, Any]:
    """Read the results of a figure.

    Args:
        path: A file that `save_results` or an earlier version has written.

    Returns:
        The results, with each row as a dict of all that was measured and of what it belongs to.

    Raises:
        ValueError: If the file holds something else; names it.
        OSError: If it cannot be read.
    """
    try:
        results = json.loads(path.read_text())
        for name in _EXPECTED:
            results[name]
        return _joined(results)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: expected the rows of a figure, found something else ({error})") from error


def _taken_apart(results: dict[str, Any]) -> dict[str, Any]:
    """Runs, questions, columns and rows, as far as there are any."""
    rows: Sequence[Row] = results["rows"]
    names = list(dict.fromkeys(row["run"] for row in rows if "run" in row))
    of_runs = [field for field in _OF_RUNS if _belongs_to_runs(field, rows)]
    runs = {row["run"]: {field: row[field] for field in of_runs} for row in rows if "run" in row}
    questions: dict[str, int] = {}
    left = []
    for row in rows:
        row, question = _without_question(row)
        if question:
            number = questions.setdefault(json.dumps(question), len(questions))
            row = {**row, "question": number}
        left.append({field: value for field, value in row.items() if field not in of_runs})
    columns = list(dict.fromkeys(field for row in left for field in row))
    # Where a run and a question are told stands before what was measured, and long lists behind it.
    told = ("line", "group", "run", "question")
    columns.sort(key=lambda field: (*told, field).index(field) + (field in _IN_PARTS))
    found = {
        "runs": {name: runs[name] for name in names},
        "questions": [json.loads(question) for question in questions],
        "columns": columns,
    }
    return {name: value for name, value in found.items() if value} | {
        "rows": [[row[field] for field in columns] if len(row) == len(columns) else row for row in left]
    }


def _belongs_to_runs(field: str, rows: Sequence[Row]) -> bool:
    """Whether a field has one value a run, which it has in all rows."""
    values: dict[str, str] = {}
    return all(
        "run" in row
        and field in row
        and values.setdefault(row["run"], json.dumps(row[field])) == json.dumps(row[field])
        for row in rows
    )


def _without_question(row: Row) -> tuple[Row, Row]:
    """A row without what belongs to its question, and that; only rows of runs are answers."""
    if "run" not in row:
        return row, {}
    question = {field: row[field] for field in _OF_QUESTIONS if field in row}
    parts = {field: row[field] for field in _IN_PARTS if field in row}
    question |= {field: list(values) for field, values in parts.items()}
    row = {field: value for field, value in row.items() if field not in _OF_QUESTIONS}
    return row | {field: list(values.values()) for field, values in parts.items()}, question


def _joined(results: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_taken_apart`."""
    if "columns" not in results:
        return results
    rows = []
    for cells in results["rows"]:
        row = cells if isinstance(cells, dict) else dict(zip(results["columns"], cells, strict=True))
        question = results["questions"][row.pop("question")] if "question" in row else {}
        named = {
            field: dict(zip(names, row[field], strict=True))
            for field, names in question.items()
            if field in _IN_PARTS
        }
        run = results["runs"][row["run"]] if "run" in row else {}
        rows.append({**run, **question, **row, **named})
    return {
        name: value for name, value in results.items() if name not in ("runs", "questions", "columns")
    } | {"rows": rows}


def _in_lines(value: Any) -> str:
    """JSON with a line for each entry of a list or a dict of lists and dicts, so that changes can be read."""
    entries: Iterable[str]
    match value:
        case list() if any(isinstance(entry, list | dict) for entry in value):
            opened, closed, entries = "[", "]", map(json.dumps, value)
        case dict() if any(isinstance(entry, list | dict) for entry in value.values()):
            opened, closed = "{", "}"
            entries = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
        case _:
            return json.dumps(value)
    return f"{opened}\n  " + ",\n  ".join(entries) + f"\n {closed}"
