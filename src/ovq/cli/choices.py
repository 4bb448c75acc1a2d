"""The options that say how tokens are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.fields import LARGEST_SEED

if TYPE_CHECKING:
    from ovq.hf.streaming import Sampling

Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from this many of the likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens with this total probability.")]
MinP = Annotated[
    float, typer.Option(help="Sample from tokens at least this share as likely as the likeliest.")
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the sampling.")]


def sampling_of(**fields: Any) -> Sampling:
    """How tokens are chosen; errors name the flags."""
    from ovq.hf.streaming import Sampling

    try:
        return Sampling(**fields)
    except ValueError as error:
        field, _, what = str(error).partition(":")
        raise ValueError(f"--{field.replace('_', '-')}:{what}") from None
