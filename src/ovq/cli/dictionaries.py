"""The options that give a model another dictionary."""

from __future__ import annotations

from typing import Annotated

import typer

from ovq.fields import did_you_mean

Size = Annotated[int | None, typer.Option(min=1, help="Another size of the dictionary.")]
Rule = Annotated[
    str | None,
    typer.Option(help="Another merge rule, on the same weights; nearest recalls most."),
]

LognLength = Annotated[
    int | None,
    typer.Option(
        min=2, help="Scale logits beyond this many tokens, best those of the training texts (log-n scaling)."
    ),
]


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
