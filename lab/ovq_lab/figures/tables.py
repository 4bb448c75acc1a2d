"""Tables in Markdown files, generated from the results files that they show.

Markers in the Markdown file enclose a table and name its description in a JSON file:

    <!-- table: tables.json recall -->
    ...
    <!-- end -->

`ovq reproduce --tables FILE` writes the table between the markers. A description says which rows of a results
file each line of the table uses (`rows`: a label, and values that a row must have), and what the table shows
of them (`columns`, see `Column`). A cell is the mean over seeds of the rows that both select. Paths are
relative to the file that contains them.

    "recall": {
     "file": "results/recall.json",
     "head": "mixer",
     "rows": [
      "full attention",
      {"label": "**OVQ**", "line": "OVQ, 64 slots"}
     ],
     "columns": [
      {"over": "length", "values": [256, 1024], "value": "accuracy", "spread": 0.02},
      {"head": "bytes at 1k", "value": "state_bytes", "length": 1024, "form": "commas"}
     ]
    }

A row that is a string stands for the line of that name. An entry with a field in `over` gives one column for
each of its `values`, with `heads` as column heads, or else the values. Keys that are not options of a column
are values that a row must have.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ovq.runtime.files import read_json, write_atomic
from ovq_lab.eval.rows import short_number
from ovq_lab.figures.results import Row, load_results
from ovq_lab.plots.draw import field_of

_START = re.compile(r"^<!-- table: (\S+) (\S+) -->\n", re.MULTILINE)
_MARKED = re.compile(_START.pattern + r"(.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL)
_FORMS = ("number", "commas", "MiB", "seeds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table: the value that it shows of each line's rows.

    Attributes:
        head: The head of the column.
        value: A field, or a field of a part as `"part.field"`; several are shown side by side.
        where: Further values that a row must have, in addition to the line's: a value, or a list of allowed
            values, by field.
        file: A results file other than the table's.
        each: A field, and the values of it that are shown one after the other in a cell.
        positions: With `value="position_losses"`, the first and the last position of the mean.
        relative_to: Show the value in per cent, seed by seed, of the value of a base row, in which these
            fields replace those of the line; `file` names another results file for the base row, and `by` the
            line's fields that select it.
        above: Show the per cent above the base row instead; empty for the base row itself.
        form: `"number"`, `"commas"` (1,234), `"MiB"`, or `"seeds"` for the value of each seed instead of the
            mean.
        digits: Digits after the decimal point.
        spread: Show the lowest and the highest seed too if they differ by this much.
        unit: Written after a mean.
        learned: Condition for a seed to have learned its task, on the column's own value, as
            `{"length": 256, "at_least": 0.9}`, or `"at_most"` for errors. Other seeds are left out of the
            mean, unless none has learned.
        says_learned: Show in each cell how many seeds have learned the task, if not all have.
    """

    head: str
    value: str | tuple[str, ...]
    where: dict[str, Any]
    file: str | None = None
    each: tuple[str, tuple[Any, ...]] | None = None
    positions: tuple[int, int] | None = None
    relative_to: dict[str, Any] | None = None
    above: bool = False
    form: str = "number"
    digits: int = 3
    spread: float | None = None
    unit: str = ""
    learned: dict[str, Any] | None = None
    says_learned: bool = False

    def __post_init__(self) -> None:
        """Check that `form` is known."""
        if self.form not in _FORMS:
            raise ValueError(f"form: expected one of {', '.join(_FORMS)}, found {self.form!r}")


_OPTIONS = {field.name for field in dataclasses.fields(Column)} - {"where"}


def update_tables(paths: Sequence[Path]) -> list[Path]:
    """Update the tables of Markdown files; none is written if any table cannot be made."""
    texts = {path: with_tables(path) for path in paths}
    changed = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
    for path in changed:
        write_atomic(path, texts[path])
    return changed


def with_tables(path: Path) -> str:
    """The text of a Markdown file, with its tables filled in from the results."""
    text = path.read_text(encoding="utf-8")
    num_marked = len(_MARKED.findall(text))
    if not num_marked or not num_marked == len(_START.findall(text)) == text.count("<!-- end -->"):
        raise ValueError(
            f"{path}: expected tables, each between <!-- table: FILE.json NAME --> and <!-- end -->, found "
            f"{len(_START.findall(text))} beginnings and {text.count('<!-- end -->')} ends"
        )

    def made(match: re.Match[str]) -> str:
        description, name = path.parent / match[1], match[2]
        try:
            return f"<!-- table: {match[1]} {name} -->\n{make_table(description, name)}<!-- end -->"
        except KeyError as error:
            raise ValueError(
                f"{path}: table {name} of {description}: expected {error}, found none"
            ) from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: table {name} of {description}: {error}") from error

    return _MARKED.sub(made, text)


def make_table(description: Path, name: str) -> str:
    """A table in Markdown, by its name in the JSON file that describes it."""
    tables = read_json(description)
    if name not in tables:
        raise ValueError(f"expected one of {', '.join(tables)}, found {name!r}")
    table = tables[name]
    rows_of = functools.cache(lambda file: _read(description.parent / (file or table["file"])))
    columns = [column for entry in table["columns"] for column in _columns(entry)]
    lines = [_cells((table["head"], *(column.head for column in columns)))]
    lines.append(_cells(["---", *("---" if column.form == "seeds" else "---:" for column in columns)]))
    for entry in table["rows"]:
        line = {"label": entry, "line": entry} if isinstance(entry, str) else dict(entry)
        label = line.pop("label")
        lines.append(_cells((label, *(_cell(column, line, rows_of) for column in columns))))
    return "\n".join(lines) + "\n"


def _columns(entry: dict[str, Any]) -> Iterable[Column]:
    """The columns of an entry: one, or one for each value of the field in `over`."""
    options = {name: value for name, value in entry.items() if name in _OPTIONS}
    where = {name: value for name, value in entry.items() if name not in _OPTIONS}
    if "over" not in entry:
        yield Column(**{**options, "where": where})
        return
    field, values = where.pop("over"), where.pop("values")
    heads = where.pop("heads", [short_number(value) if isinstance(value, int) else value for value in values])
    for head, value in zip(heads, values, strict=True):
        yield Column(**{**options, "head": head, "where": {**where, field: value}})


_RowsOf = Callable[[str | None], list[Row]]
"""Maps a file name to its rows; None is the table's own file."""


def _read(path: Path) -> list[Row]:
    content = read_json(path)
    if isinstance(content, list):
        return content
    return load_results(path)["rows"] if "figure" in content else content["rows"]


def _cell(column: Column, line: dict[str, Any], rows_of: _RowsOf) -> str:
    """The text of a cell."""
    file = column.file or line.get("file")
    where = {name: value for name, value in line.items() if name != "file"}
    where |= column.where
    if column.each is None:
        return _value_text(column, where, file, rows_of)
    field, values = column.each
    return ", ".join(_value_text(column, {**where, field: value}, file, rows_of) for value in values)


def _value_text(column: Column, where: dict[str, Any], file: str | None, rows_of: _RowsOf) -> str:
    if not isinstance(column.value, str):
        return ", ".join(
            _value_text(dataclasses.replace(column, value=value), where, file, rows_of)
            for value in column.value
        )
    values = _by_seed(column, where, rows_of(file))
    if column.relative_to is not None:
        other = dict(column.relative_to)
        base_file = other.pop("file", file)
        base = {**{name: where[name] for name in other.pop("by", where) if name in where}, **other}
        if column.above and base == where and base_file == file:
            return ""
        bases = _by_seed(column, base, rows_of(base_file))
        if missing := set(values) - set(bases):
            raise ValueError(f"relative_to: expected rows of {base} for each seed, found none of {missing}")
        values = {seed: 100 * (value / bases[seed] - column.above) for seed, value in values.items()}
    if column.learned is None:
        return _over_seeds(column, list(values.values()))
    learned = _learned(column, where, rows_of(file))
    text = _over_seeds(column, [value for seed, value in values.items() if seed in (learned or values)])
    if not column.says_learned or learned >= set(values):
        return text
    return f"{text}, {len(learned)} of {len(values)} seeds" if learned else f"{text}, not learned"


def _learned(column: Column, where: dict[str, Any], rows: Iterable[Row]) -> set[Any]:
    """Seeds that have learned their task."""
    assert column.learned is not None
    condition = dict(column.learned)
    lowest, highest = condition.pop("at_least", -math.inf), condition.pop("at_most", math.inf)
    values = _by_seed(dataclasses.replace(column, positions=None), where | condition, rows)
    return {seed for seed, value in values.items() if lowest <= value <= highest}


def _by_seed(column: Column, where: dict[str, Any], rows: Iterable[Row]) -> dict[Any, Any]:
    """The value of each seed."""
    assert isinstance(column.value, str), "one field at a time"
    found: dict[Any, Any] = {}
    allowed = {name: value if isinstance(value, list) else [value] for name, value in where.items()}
    for row in rows:
        if not all(field_of(row, name) in values for name, values in allowed.items()):
            continue
        value = field_of(row, column.value)
        if column.positions is not None:
            value = _mean_over(value, *column.positions)
        # As text, because NaN (of a run that diverged) equals nothing.
        if str(found.setdefault(row.get("seed"), value)) != str(value):
            raise ValueError(f"expected one {column.value} per seed of {where}, found two that differ")
    if not found:
        raise ValueError(f"expected rows of {where}, found none")
    return found


def _mean_over(losses: dict[str, float], first: int, last: int) -> float:
    """Mean loss over positions, from means over octaves that are named by their ends.

    Example:
        >>> _mean_over({"1024": 9.0, "2048": 3.0, "4096": 6.0}, 1024, 4096)
        5.0
    """
    ends = sorted(map(int, losses))
    starts = dict(zip(ends, [0, *ends], strict=False))
    inside = [end for end in ends if first < end <= last]
    if not inside or (starts[inside[0]], inside[-1]) != (first, last):
        raise ValueError(f"positions: expected two of 0, {', '.join(map(str, ends))}, found {first}, {last}")
    return sum(losses[str(end)] * (end - starts[end]) for end in inside) / (last - first)


def _over_seeds(column: Column, values: Sequence[Any]) -> str:
    """Format the values of the seeds for a cell."""
    if column.form == "seeds":
        return ", ".join(_number(column, value) for value in values)
    mean, low, high = sum(values) / len(values), min(values), max(values)
    if column.form == "MiB":
        return f"{mean / 2**20:.1f} MiB"
    if column.form == "commas":
        return f"{mean:,.0f}"
    text = _number(column, mean) + column.unit
    bounds = [_number(column, low), _number(column, high)]
    # With NaN among them, the bounds depend on the order of the seeds.
    if math.isnan(mean) or column.spread is None or high - low < column.spread or bounds[0] == bounds[1]:
        return text
    return f"{text} ({' to '.join(bounds)})"


def _number(column: Column, value: float) -> str:
    # A value that rounds to zero is shown without its sign.
    return f"{round(value, column.digits) + 0.0:.{column.digits}f}"


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
