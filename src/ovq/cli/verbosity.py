"""`-q` and `-v`, which every command takes, before its name (`ovq -q train ...`) or among its options; and
warnings in one line, as errors are.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ovq.runtime.verbosity import is_verbose, set_quiet, set_verbose


def _quiet(is_wanted: bool) -> None:
    if is_wanted:
        set_quiet()


def _verbose(is_wanted: bool) -> None:
    if is_wanted:
        set_verbose()


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_quiet, is_eager=True, expose_value=False, help="Show no progress."
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        callback=_verbose,
        is_eager=True,
        expose_value=False,
        help="Show what libraries log, and where an error comes from.",
    ),
]


@contextlib.contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Let warnings say what is the matter, and with `-v` alone where they come from."""
    before = warnings.formatwarning

    def formatted(message: Warning | str, *where: Any, **line: Any) -> str:
        return before(message, *where, **line) if is_verbose() else f"ovq: warning: {message}\n"

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def add_to_commands(program: Any) -> None:
    """Let all commands of a program take the options that it takes itself, but `--version`.

    Args:
        program: What typer makes of an app; typer itself lets commands share no options.
    """
    shared = [option for option in program.params if option.name in ("quiet", "verbose", "imports")]
    for command in commands_of(program):
        command.params.extend(shared)


def commands_of(group: Any) -> Iterator[Any]:
    """The commands of a program, and those of its groups."""
    for command in group.commands.values():
        yield command
        if hasattr(command, "commands"):
            yield from commands_of(command)
