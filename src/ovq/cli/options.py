"""Options of several commands; all commands take those of `EVERYWHERE`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.fields import LARGEST_SEED, did_you_mean
from ovq.plugins import import_module
from ovq.runtime.verbosity import set_quiet, set_verbose

if TYPE_CHECKING:
    from ovq.hf.streaming import Sampling

_WEIGHT_DTYPES = ("auto", "float32", "bfloat16", "int8", "int4")


def check_rule(rule: str | None) -> str | None:
    """Check the value of `--merge`, which may be None or a rule of earlier versions; returns it.

    Raises:
        ValueError: If there is no such rule; names the flag.

    Example:
        >>> check_rule("nearest")
        'nearest'
    """
    if rule is None:
        return None
    from ovq.ops.options import CURRENT_MERGES, MERGES

    if rule not in MERGES:
        raise ValueError(
            f"--merge: expected rules among {', '.join(CURRENT_MERGES)}, found {rule!r}"
            f"{did_you_mean(rule, CURRENT_MERGES)}"
        )
    return rule


def _check_weight_dtype(found: str | None) -> str | None:
    if found is not None and found not in _WEIGHT_DTYPES:
        raise ValueError(
            f"--weight-dtype: expected one of {', '.join(_WEIGHT_DTYPES)}, found {found!r}"
            f"{did_you_mean(found, _WEIGHT_DTYPES)}"
        )
    return found


def _import(modules: list[str]) -> None:
    for module in modules:
        import_module(module)


def _verbosity(name: str, set_it: Callable[[], None], about: str) -> Any:
    def set_if(is_wanted: bool) -> None:
        if is_wanted:
            set_it()

    return typer.Option(
        f"--{name}", f"-{name[0]}", callback=set_if, is_eager=True, expose_value=False, help=about
    )


Quiet = Annotated[bool, _verbosity("quiet", set_quiet, "Show no progress.")]
Verbose = Annotated[
    bool, _verbosity("verbose", set_verbose, "Show what libraries log, and where an error comes from.")
]
Import = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_import,
        is_eager=True,
        expose_value=False,
        help="Import a module of yours first, which registers tasks or mixers; can be given several times.",
    ),
]
EVERYWHERE = ("quiet", "verbose", "imports")

Model = Annotated[Path, typer.Option(help="Folder of a trained or converted model.")]
Size = Annotated[int | None, typer.Option(min=1, help="Another size of the dictionary.")]
Rule = Annotated[
    str | None,
    typer.Option(callback=check_rule, help="Another merge rule, on the same weights; nearest recalls most."),
]
LognLength = Annotated[
    int | None,
    typer.Option(
        min=2, help="Scale logits beyond this many tokens, best those of the training texts (log-n scaling)."
    ),
]
WeightDtype = Annotated[
    str | None,
    typer.Option(
        callback=_check_weight_dtype,
        help="Format of a converted model's weights on a CPU: float32, bfloat16, int8 or int4; that of the "
        "file if not given.",
    ),
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from this many of the likeliest tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens with this total probability.")]
MinP = Annotated[
    float, typer.Option(help="Sample from tokens at least this share as likely as the likeliest.")
]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the sampling.")]
SlotSeed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help='Seed of the slots, in models with init="random".')
]


def sampling_of(**fields: Any) -> Sampling:
    """The `Sampling` with these fields; errors name the flags."""
    from ovq.hf.streaming import Sampling

    try:
        return Sampling(**fields)
    except ValueError as error:
        field, _, what = str(error).partition(":")
        raise ValueError(f"--{field.replace('_', '-')}:{what}") from None
