"""The options that determine which dictionaries a command tests a model with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypedDict

import typer

from ovq.cli.common import parse_ints
from ovq.fields import did_you_mean

Sizes = Annotated[
    str | None,
    typer.Option(
        help="Sizes of the dictionary to test, on the same weights; the trained one if not given.",
        show_default=False,
    ),
]
Size = Annotated[int | None, typer.Option(min=1, help="Another size of the dictionary.", show_default=False)]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        help="Rules of keeping the dictionary to test, on the same weights: existing (the paper's), "
        "updated, nearest (recalls most); the trained one if not given.",
        show_default=False,
    ),
]

Rule = Annotated[
    str | None,
    typer.Option(
        help="Another rule of keeping the dictionary, on the same weights; nearest recalls most.",
        show_default=False,
    ),
]

LognLength = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Scale logits beyond this many tokens, best those of the training texts (log-n scaling).",
        show_default=False,
    ),
]


class Tested(TypedDict):
    """The arguments of the tests of `ovq.eval` that both options make."""

    num_slots: list[int]
    merges: list[str]


def parse(num_slots: str | None, merge: Sequence[str] | None) -> Tested:
    """Read `--num-slots` and `--merge`.

    Raises:
        ValueError: If a size is not a positive integer, or there is no such rule; names the flag.

    Example:
        >>> parse("64, 256", ["nearest,existing", "nearest"])
        {'num_slots': [64, 256], 'merges': ['nearest', 'existing']}
        >>> parse(None, None)
        {'num_slots': [], 'merges': []}
    """
    sizes = [] if num_slots is None else parse_ints(num_slots, flag="--num-slots")
    return {"num_slots": sizes, "merges": [] if merge is None else _parse_rules(merge)}


def _parse_rules(texts: Sequence[str]) -> list[str]:
    """Read rules such as `["existing,nearest"]` or `["existing", "nearest"]`; each counts once."""
    from ovq.ops.options import current_merge

    rules = [part.strip() for text in texts for part in text.split(",")]
    for rule in rules:
        check_rule(rule)
    return list(dict.fromkeys(map(current_merge, rules)))


def check_rule(rule: str | None) -> None:
    """Check the `--merge` of a command that takes one rule, or none; those of earlier versions pass.

    Raises:
        ValueError: If there is no such rule; names the flag.

    Example:
        >>> check_rule("nearest"), check_rule(None)
        (None, None)
    """
    from ovq.ops.options import CURRENT_MERGES, MERGES

    if rule is not None and rule not in MERGES:
        raise ValueError(
            f"--merge: expected rules among {', '.join(CURRENT_MERGES)}, found {rule!r}"
            f"{did_you_mean(rule, CURRENT_MERGES)}"
        )
