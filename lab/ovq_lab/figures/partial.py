"""Remaking some lines of a figure, with the rows of all others taken from its results file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ovq_lab.figures.plan import Figure, Line
from ovq_lab.figures.results import load_results

_HELD_OUT = re.compile(r"--held-out (\S+)")
_MIXER = re.compile(r"--mixer (\S+)")


def chosen_lines(figure: Figure, patterns: Sequence[str]) -> Figure:
    """The figure with the lines whose labels match a pattern (`*` for any text); all without patterns."""
    if not patterns:
        return figure
    labels = list(dict.fromkeys(line.label for line in figure.lines))
    for pattern in patterns:
        if not any(fnmatchcase(label, pattern) for label in labels):
            raise ValueError(
                f"--lines: expected labels of {figure.name}, such as {', '.join(map(repr, labels))}, "
                f"found {pattern!r}"
            )
    chosen = tuple(line for line in figure.lines if any(fnmatchcase(line.label, each) for each in patterns))
    groups = {line.group for line in chosen}
    panels = tuple(panel for panel in figure.panels if panel.group in groups)
    return dataclasses.replace(figure, lines=chosen, panels=panels)


def earlier_results(path: Path, figure: Figure, seeds: Sequence[int]) -> dict[str, Any] | None:
    """Load the results of a figure of which some lines are remade; None if there are none yet."""
    if not path.is_file():
        return None
    results = load_results(path)
    if results["seeds"] != list(seeds):
        raise ValueError(f"--lines: expected {path} to be of seeds {list(seeds)}, found {results['seeds']}")
    # The name of a figure says of which corpus it is, but not how much of it was held out.
    expected, found = (_HELD_OUT.findall(text) for text in (figure.arguments, results["command"]))
    if expected != found:
        raise ValueError(
            f"--lines: expected {path} to be made with --held-out {', '.join(expected) or 'left out'}, "
            f"found {', '.join(found) or 'it left out'}"
        )
    commands = [results["command"], *(update["command"] for update in results.get("updates", []))]
    for mixer in _MIXER.findall(" ".join(commands)):
        if mixer not in _MIXER.findall(figure.arguments):
            raise ValueError(f"--lines: expected --mixer {mixer} beside it, as {path} has its lines")
    return results


def joined_results(
    figure: Figure, part: Figure, earlier: dict[str, Any] | None, made: dict[str, Any]
) -> dict[str, Any]:
    """Merge the earlier results of a figure, if there are any, with those of a remade part.

    `updates` records the remade lines with their command and environments; `note` names lines that are in
    neither.
    """
    anew = set(map(_place, part.lines))
    rows = []
    # Lines with the same label and group share their rows.
    for place, line in {_place(line): line for line in figure.lines}.items():
        source = made["rows"] if place in anew else earlier["rows"] if earlier else []
        rule = line.config.model.merge if line.config.mixer == "ovq" else None
        # Rows of earlier versions lack the merge rule, which was that of training.
        rows += [{"merge": rule, **row} for row in source if (row["line"], row["group"]) == place]
    found = {row["line"] for row in rows}
    missing = [label for label in dict.fromkeys(line.label for line in figure.lines) if label not in found]
    joined = {
        **made,
        "note": made["note"] + (f" Not made yet: {', '.join(missing)}." if missing else ""),
        "panels": [dataclasses.asdict(panel) for panel in figure.panels],
        "rows": rows,
    }
    if earlier is None:
        return joined
    update = {
        "lines": list(dict.fromkeys(line.label for line in part.lines)),
        "command": made["command"],
        "environments": made["environments"],
    }
    swept = {entry["line"] for entry in made["sweep"]}
    # Earlier updates keep the lines that still exist and are not remade now.
    updates = []
    for each in earlier.get("updates", []):
        lines = [label for label in each["lines"] if label in found and label not in update["lines"]]
        updates += [each | {"lines": lines}] if lines else []
    return {
        **joined,
        "command": earlier["command"],
        "sweep": [entry for entry in earlier["sweep"] if entry["line"] not in swept] + made["sweep"],
        "environments": earlier["environments"],
        "updates": [*updates, update],
    }


def _place(line: Line) -> tuple[str, str]:
    return line.label, line.group
