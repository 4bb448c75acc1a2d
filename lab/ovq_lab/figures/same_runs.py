"""Rows of a figure that the files of other figures have, because these evaluated the same runs alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ovq_lab.figures.evaluations import Evaluation
from ovq_lab.figures.plan import Figure, Line, Trial, run_name, with_seed, with_trial
from ovq_lab.figures.results import load_results
from ovq_lab.train.config import RunConfig


def found_elsewhere(
    folder: Path, figure: Figure, lines: Sequence[Line], seeds: Sequence[int]
) -> dict[str, Any]:
    """What other figures know of some lines, in the form of a file of results.

    Args:
        folder: That of the files of results.
        figure: What the lines are of. If it tries several settings, only files that have tried them count.
        lines: What is looked for; a line is found if all its evaluations are, for all seeds, in one file.
        seeds: The seeds.

    Returns:
        The rows of the lines that were found, how their settings were chosen, and the commands and the
        hardware that they come from.
    """
    files = [load_results(path) for path in sorted(folder.glob("*.json"))]
    found: dict[str, Any] = {"seeds": list(seeds), "rows": [], "sweep": {}, "environments": []}
    used = []
    first = {run_name(line.swept): line.label for line in reversed(figure.lines)}
    for line in lines:
        for results, trial in _places(line, figure.trials, files):
            rows = [
                row for seed in seeds for row in _rows(results, with_trial(line.config, trial), line, seed)
            ]
            entry = _entry(results, line, trial)
            if len(rows) < len(seeds) * len(line.evaluations) or (figure.trials and entry is None):
                continue
            found["rows"] += rows
            if entry is not None:
                label = first[run_name(line.swept)]
                found["sweep"].setdefault(label, {**entry, "line": label})
            used += [results] if results not in used else []
            break
    for results in used:
        records = [results, *results.get("updates", [])]
        found["environments"] += [each for record in records for each in record["environments"]]
    return {
        **found,
        "sweep": list(found["sweep"].values()),
        "command": "; ".join(results["command"] for results in used),
    }


def _places(
    line: Line, trials: Sequence[Trial], files: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], Trial]]:
    for results in files:
        for trial in trials or (Trial.of(line.config),):
            yield results, trial


def _rows(results: dict[str, Any], config: RunConfig, line: Line, seed: int) -> Iterator[dict[str, Any]]:
    """At most one row for each evaluation of a line."""
    run = run_name(with_seed(config, seed))
    of_run = [row for row in results["rows"] if row.get("run") == run]
    for evaluation in line.evaluations:
        for row in of_run:
            if _is_of(row, evaluation, config):
                yield {**row, "line": line.label, "group": line.group}
                break


def _is_of(row: dict[str, Any], evaluation: Evaluation, config: RunConfig) -> bool:
    """Whether a row of a run tells the outcome of an evaluation."""
    if config.mixer == "ovq":
        num_slots = evaluation.num_slots or config.model.num_slots
        rule = evaluation.merge or config.model.merge
        # Rows of earlier versions do not say which rule kept the dictionary: that of training.
        if row["num_slots"] != num_slots or row.get("merge", config.model.merge) != rule:
            return False
    if row.get("logn_length") != evaluation.logn_length:
        return False
    return all(name in row and _agree(row[name], value) for name, value in evaluation.row_fields().items())


def _agree(one: Any, other: Any) -> bool:
    """Whether values are equal; of parts, what both have, as earlier versions had fewer fields."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(_agree(one[name], other[name]) for name in one.keys() & other.keys())
    return bool(one == other)


def _entry(results: dict[str, Any], line: Line, trial: Trial) -> dict[str, Any] | None:
    """How the settings of a line were chosen, where they were."""
    for entry in results.get("sweep", []):
        if entry["mixer"] == line.config.mixer and entry["chosen"] == trial.label:
            return entry
    return None
