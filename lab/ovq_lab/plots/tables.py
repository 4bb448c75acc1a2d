"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

from rich.table import Table

from ovq.runtime.units import format_bytes
from ovq_lab.eval.rows import ResultRow


def result_table(
    rows: Sequence[ResultRow], *, title: str, value: Callable[[ResultRow], float] = attrgetter("accuracy")
) -> Table:
    """Accuracy, or another value, by model and length in tokens, and the bytes of state at the longest one.

    Example:
        >>> row = ResultRow(mixer="ovq", num_slots=64, length=256, accuracy=0.5, state_bytes=2048,
        ...                 num_questions=2, slices={})
        >>> table = result_table([row], title="recall")
        >>> [column.header for column in table.columns]
        ['model', '256', 'state at 256']
    """
    lengths = sorted({row.length for row in rows})
    # So the longest names of the demonstration fit into 80 columns.
    table = Table(title=title, pad_edge=False)
    table.add_column("model", no_wrap=True)
    for length in lengths:
        table.add_column(f"{length}", justify="right")
    table.add_column(f"state at {lengths[-1]}", justify="right")
    for label in dict.fromkeys(row.label for row in rows):
        by_length = {row.length: row for row in rows if row.label == label}
        cells = [f"{value(by_length[length]):.3f}" if length in by_length else "" for length in lengths]
        longest = by_length.get(lengths[-1])
        table.add_row(label, *cells, "" if longest is None else format_bytes(longest.state_bytes))
    return table


def slice_table(rows: Sequence[ResultRow], *, title: str) -> Table:
    """Accuracy by model and slice at the longest length, and the mean error for tasks that have one."""
    longest = max(row.length for row in rows)
    rows = [row for row in rows if row.length == longest]
    # All models have the same slices, because they are tested on the same examples.
    table = Table(title=title)
    table.add_column("slice", no_wrap=True)
    for row in rows:
        table.add_column(row.label, justify="right")
    for name in rows[0].slices:
        table.add_row(name, *(_slice_cell(row, name) for row in rows))
    return table


def _slice_cell(row: ResultRow, name: str) -> str:
    error = f" ({row.slice_errors[name]:.3f})" if name in row.slice_errors else ""
    return f"{row.slices[name]:.3f}{error}"
