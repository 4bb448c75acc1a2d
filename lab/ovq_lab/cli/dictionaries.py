"""Command line options for the dictionaries that a model is tested with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypedDict

import typer

from ovq.cli.common import parse_ints
from ovq.cli.options import check_merge_rule

Sizes = Annotated[
    str | None,
    typer.Option(help="Slots per head to test, on the same weights; default: as trained."),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        help="Merge rules to test, on the same weights: existing (the paper's), updated, nearest (best "
        "recall); default: as trained."
    ),
]


class Tested(TypedDict):
    """Arguments of the functions in `ovq_lab.eval` that these options set."""

    num_slots: list[int]
    merges: list[str]


def parse(num_slots: str | None, merge: Sequence[str] | None) -> Tested:
    """Parse `--num-slots` and `--merge`.

    Example:
        >>> parse("64, 256", ["nearest,existing", "nearest"])
        {'num_slots': [64, 256], 'merges': ['nearest', 'existing']}
        >>> parse(None, None)
        {'num_slots': [], 'merges': []}
    """
    sizes = [] if num_slots is None else parse_ints(num_slots, flag="--num-slots")
    return {"num_slots": sizes, "merges": [] if merge is None else _parse_rules(merge)}


def _parse_rules(texts: Sequence[str]) -> list[str]:
    """Parse rules such as `["existing,nearest"]` or `["existing", "nearest"]`, without duplicates."""
    from ovq.ops.options import current_merge

    rules = [part.strip() for text in texts for part in text.split(",")]
    for rule in rules:
        check_merge_rule(rule)
    return list(dict.fromkeys(map(current_merge, rules)))
