"""Results of `ovq eval` as Markdown tables, for the card of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from ovq.hf.card import markdown_table
from ovq.runtime.files import read_json
from ovq.runtime.units import format_bytes
from ovq_lab.eval.language import LanguageRow
from ovq_lab.eval.needle import NeedleRow
from ovq_lab.eval.rows import ResultRow
from ovq_lab.text.readers import parts_of, public_name

Row = TypeVar("Row", LanguageRow, NeedleRow, ResultRow)


def results_as_markdown(path: Path, *, model: Path) -> str:
    """A Markdown table of the results of a model, after a sentence that says what was tested.

    The file is `lm.json`, `needle.json` or `harness.json` of `ovq eval ... --out`, or the output of
    `ovq eval --json`.
    """
    found = read_json(path)
    about: Mapping[str, Any] = found if isinstance(found, dict) else {}
    try:
        tested = [Path(name) for name in (about["models"] if "models" in about else [about["model"]])]
        if about.get("results"):
            text = _harness(about)
        else:
            text = _KINDS[next(key for key in _KINDS if key in about["rows"][0])](about)
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError) as error:
        raise ValueError(f"{path}: expected results of ovq eval, found something else ({error!r})") from None
    if [name.resolve() for name in tested] != [model.resolve()]:
        names = ", ".join(map(str, tested))
        raise ValueError(f"{path}: expected results of {model} alone, found those of {names}")
    return text


def _language(about: Mapping[str, Any]) -> str:
    """Loss and bits per byte of long documents."""
    rows = _read(LanguageRow, about)
    text = "Text" if _trained_on(about) else "Held-out text"
    return f"{text}, {_source(about)} (`ovq eval lm`):\n\n" + markdown_table(
        ("model", "tokens", "windows", "loss, nats per token", "bits per byte", "state"),
        (
            (
                row.label,
                f"{row.length:,}",
                f"{row.num_windows}",
                f"{row.loss:.4f}",
                "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
                format_bytes(row.state_bytes),
            )
            for row in rows
        ),
    )


def _needle(about: Mapping[str, Any]) -> str:
    """Share of values found, by length; mean over depths."""
    rows = _read(NeedleRow, about)
    source = "" if about["source"] is None else f", {_source(about)}"
    num_depths = len({row.depth for row in rows})
    return (
        f"A {rows[0].value} in {rows[0].haystack}{source}: share of values that greedy generation produces "
        f"(`ovq eval needle`; {rows[0].num_examples} questions at each of {num_depths} depths):\n\n"
        + _by_length(rows, lambda row: row.generated, 2)
    )


def _accuracy(about: Mapping[str, Any]) -> str:
    """Accuracy or mean error on a synthetic task, by length."""
    rows = _read(ResultRow, about)
    has_error = rows[0].mean_error is not None
    what = "mean error" if has_error else "share of right answers"
    return f"The task of its training, by tokens per example: {what} (`ovq eval`):\n\n" + _by_length(
        rows, lambda row: row.mean_error if has_error else row.accuracy, 3
    )


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "loss": _language,
    "generated": _needle,
    "accuracy": _accuracy,
}
"""Table functions by a field that only their kind of row has."""


def _harness(about: Mapping[str, Any]) -> str:
    try:
        from lm_eval.utils import make_table
    except ImportError as error:
        raise ValueError(
            "results of the harness: expected the package lm-eval, found none; pip install './lab[harness]'"
        ) from error
    results = {
        task: {name: math.nan if value is None else value for name, value in found.items()}
        for task, found in about["results"].items()
    }
    table: str = make_table({**about, "results": results})
    return "Tasks of the lm-evaluation-harness (`ovq eval harness`):\n\n" + table.strip()


def _read(kind: type[Row], about: Mapping[str, Any]) -> list[Row]:
    """The rows of a file; unknown fields (of a later version) are ignored."""
    names = {field.name for field in dataclasses.fields(kind)}
    return [kind(**{name: row[name] for name in row if name in names}) for row in about["rows"]]


def _source(about: Mapping[str, Any]) -> str:
    parts = parts_of(about["source"]["dataset"])
    return ", ".join([*(f"`{public_name(part)}`" for part in parts), about["split"]]) + _trained_on(about)


def _trained_on(about: Mapping[str, Any]) -> str:
    """How many of the documents the model was trained on; nothing if it was not, or did not record it."""
    number = about.get("num_trained_on", [None])[0]
    return f", {number} of whose {about['num_documents']} documents it was trained on" if number else ""


def _by_length(rows: Sequence[Row], value: Callable[[Row], float | None], digits: int) -> str:
    lengths: list[int] = sorted({row.length for row in rows})
    lines: list[tuple[str, ...]] = []
    for label in dict.fromkeys(row.label for row in rows):
        own = [row for row in rows if row.label == label]
        cells: list[float] = [
            mean(found for row in own if row.length == length and (found := value(row)) is not None)
            for length in lengths
        ]
        state = format_bytes(next(row.state_bytes for row in own if row.length == lengths[-1]))
        lines.append((label, *(f"{cell:.{digits}f}" for cell in cells), state))
    return markdown_table(
        ("model", *(f"{length:,}" for length in lengths), f"state at {lengths[-1]:,}"), lines
    )
