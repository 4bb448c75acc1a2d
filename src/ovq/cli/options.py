"""Options of several commands; all commands take those of `SHARED`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.cli.common import flag_of
from ovq.fields import LARGEST_SEED, did_you_mean
from ovq.plugins import import_module
from ovq.runtime.verbosity import set_quiet, set_verbose

if TYPE_CHECKING:
    from ovq.hf.streaming import Sampling

MOST_TOKENS = 2**31 - 1
"""Largest limit of an answer's tokens."""

# Those of `ovq.ops.narrow`, which is heavy to import.
STATE_DTYPES = ("float32", "bfloat16", "int8")


def check_merge_rule(rule: str | None) -> str | None:
    """Check the value of `--merge`, which may be None or a rule of earlier versions; returns it.

    Example:
        >>> check_merge_rule("nearest")
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


def one_of(choices: tuple[str, ...], about: str) -> Any:
    """An option that is one of these names, or not given."""

    def check(param: typer.CallbackParam, found: str | None) -> str | None:
        if found is not None and found not in choices:
            raise ValueError(
                f"{flag_of(str(param.name))}: expected one of {', '.join(choices)}, found {found!r}"
                f"{did_you_mean(found, choices)}"
            )
        return found

    return typer.Option(callback=check, help=about)


def number_up_to(largest: int, about: str) -> Any:
    """An option for a number from 0 on. The help does not show its bound, which would leave less room."""

    def check(param: typer.CallbackParam, value: int) -> int:
        if not 0 <= value <= largest:
            raise ValueError(f"{flag_of(str(param.name))}: expected 0 to {largest}, found {value}")
        return value

    return typer.Option(callback=check, metavar="N", help=about)


def _import(modules: list[str]) -> None:
    for module in modules:
        import_module(module)


def _verbosity(name: str, set_verbosity: Callable[[], None], about: str) -> Any:
    def set_if_wanted(is_wanted: bool) -> None:
        if is_wanted:
            set_verbosity()

    return typer.Option(
        f"--{name}", f"-{name[0]}", callback=set_if_wanted, is_eager=True, expose_value=False, help=about
    )


Quiet = Annotated[bool, _verbosity("quiet", set_quiet, "Print no progress.")]
Verbose = Annotated[
    bool, _verbosity("verbose", set_verbose, "Show the logs of libraries, and a traceback for errors.")
]
Import = Annotated[
    list[str],
    typer.Option(
        "--import",
        metavar="MODULE",
        callback=_import,
        is_eager=True,
        expose_value=False,
        help="Import this module of yours first: it registers tasks or mixers; can be given several times.",
    ),
]
SHARED = ("quiet", "verbose", "imports")

Model = Annotated[Path, typer.Option(help="Folder of a trained or converted model.")]
NumSlots = Annotated[
    int | None, typer.Option(min=1, help="Slots per head, instead of the model's own number.")
]
MergeRule = Annotated[
    str | None,
    typer.Option(
        callback=check_merge_rule,
        help="Merge rule, instead of the model's own: existing (the paper's), updated, or nearest "
        "(best recall).",
    ),
]
LognLength = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Log-n scaling: scale attention logits beyond this many tokens, best the length of the "
        "training texts.",
    ),
]
StateDtype = Annotated[
    str | None,
    one_of(
        STATE_DTYPES,
        "Format of the slots, instead of the model's own: float32, bfloat16 or int8; at equal bytes, "
        "narrow ones are more (--num-slots).",
    ),
]
WeightDtype = Annotated[
    str | None,
    one_of(
        ("auto", "float32", "bfloat16", "int8", "int4"),
        "Data type of a converted model's weights on a CPU: float32, bfloat16, int8 or int4; "
        "default: as saved.",
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="Sampling temperature; 0 always takes the most likely token.")
]
TopK = Annotated[int, typer.Option(min=0, help="Sample from this many of the most likely tokens; 0 for all.")]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens with this total probability.")]
MinP = Annotated[
    float, typer.Option(help="Sample from tokens with at least this fraction of the highest probability.")
]
Seed = Annotated[int, number_up_to(LARGEST_SEED, "Random seed of the sampling.")]
SlotSeed = Annotated[
    int, number_up_to(LARGEST_SEED, 'Random seed of the slots, for models with init="random".')
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def sampling_of(**fields: Any) -> Sampling:
    """The `Sampling` with these fields; errors name the flags."""
    from ovq.hf.streaming import Sampling

    try:
        return Sampling(**fields)
    except ValueError as error:
        field, _, what = str(error).partition(":")
        raise ValueError(f"{flag_of(field)}:{what}") from None
