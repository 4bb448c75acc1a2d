"""The command line: `ovq convert | generate | chat | context | inspect | serve | memory`, and the commands of
the laboratory, `ovq demo | train | eval | publish | bench | reproduce`.

Each command is a small module that reads options and calls the library. Bad input ends in one line on
standard error and exit code 2. PyTorch and transformers are imported inside the commands, so that help
appears at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer

import ovq
from ovq.cli import chat, context, convert, generate, inspect, memory, options, serve
from ovq.cli.outputs import OutputPipes, accept_any_text, discard_unwritten, replace_closed_streams
from ovq.cli.signals import EndedBySignal, raised
from ovq.plugins import LABORATORY, from_laboratory, has_laboratory
from ovq.runtime.units import memory_refused
from ovq.runtime.verbosity import is_verbose

app = typer.Typer(
    name="ovq",
    help="Online vector-quantized attention: language models whose memory is a dictionary of constant size.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("convert")(convert.convert)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(context.app, name="context")
app.command("inspect")(inspect.inspect)
app.command("serve")(serve.serve)
app.command("memory")(memory.memory)

# Newer versions of typer ship their own copy of click; this is the usage error of the copy in use.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__base__  # type: ignore[assignment]  # has no name

# The code that a shell reports for a program ended by Ctrl-C.
_INTERRUPTED = 130

# The code for a program ended by SIGPIPE.
_OUTPUT_CLOSED = 141


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"ovq {ovq.__version__}")
        raise typer.Exit


@app.callback()
def _shared(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    imports: options.Import = [],  # noqa: B006  (typer reads it and never changes it)
) -> None:
    # The callbacks of the options do all the work.
    del version, quiet, verbose, imports


def _program() -> Any:
    """The app as a click command, with the laboratory's commands and the shared options."""
    program: Any = typer.main.get_command(app)
    # Not at import time: the modules of the laboratory import this package.
    laboratory: Any = typer.main.get_command(_laboratory())
    program.commands |= laboratory.commands
    # typer itself has no options shared by commands.
    shared = [option for option in program.params if option.name in options.SHARED]
    for command in _commands_of(program):
        command.params.extend(shared)
        for option in command.params:
            option.metavar = option.metavar or _metavar(option)
        # typer keeps the line breaks of docstrings, whose lines are wider than most terminals.
        command.help = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    return program


def _metavar(option: Any) -> str | None:
    """A short name of an option's values, which leaves room for its help; None for typer's own."""
    if getattr(option, "is_flag", False):
        return ""
    # Older versions of typer have the bounds in the type.
    bounds = getattr(option, "type", None) or option
    has_range = any(getattr(bounds, name, None) is not None for name in ("min", "max"))
    return "N" if has_range else None


def _commands_of(group: Any) -> Iterator[Any]:
    """All commands of a program, including those of its groups."""
    for command in group.commands.values():
        yield command
        if hasattr(command, "commands"):
            yield from _commands_of(command)


def _laboratory() -> typer.Typer:
    """The commands of the laboratory. If it is not installed, each fails with one line that says so."""
    # By itself, typer 0.19 shows markup as it is.
    commands = typer.Typer(rich_markup_mode="rich")
    for name, path in LABORATORY["command"].items():
        if not has_laboratory():
            settings = {"allow_extra_args": True, "ignore_unknown_options": True}
            commands.command(name, hidden=True, add_help_option=False, context_settings=settings)(_missing)
        elif isinstance(found := from_laboratory(path, what=f"ovq {name}"), typer.Typer):
            commands.add_typer(found, name=name)
        else:
            commands.command(name)(found)
    return commands


def _missing(context: typer.Context) -> None:
    from_laboratory("", what=f"ovq {context.info_name}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a code: 0 for success, 2 after bad input, 130 after Ctrl-C, 143
    after SIGTERM, 129 after SIGHUP, and 141 if the reader of the output has gone (`ovq ... | head`). The last
    four are the codes that a shell reports for programs ended by these signals.

    With `--verbose` or `OVQ_TRACEBACK=1`, errors show a traceback instead of one line.

    Args:
        arguments: The command line without the program's name; None for that of the process.
    """
    replace_closed_streams()
    accept_any_text()
    pipes = OutputPipes()
    try:
        with raised(), _warnings_in_one_line():
            code = _program()(args=arguments, standalone_mode=False)
            sys.stdout.flush()
    except _UsageError as error:
        # Calling a group without a command is no mistake; typer has printed its help.
        is_help = type(error).__name__ == "NoArgsIsHelpError"
        code = 0 if is_help else _fail(error.format_message())
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except EndedBySignal as error:
        _tell(f"ended by {error.name}")
        raise
    except SystemExit as error:
        # typer and rich turn a broken pipe into a SystemExit.
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        code = _code_after(error.__context__, pipes)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        code = _code_after(error, pipes)
    except (MemoryError, RuntimeError) as error:
        size = memory_refused(error)
        if size is None and not isinstance(error, MemoryError):
            raise
        found = "too little" if size is None else f"too little for {size}"
        code = _code_after(MemoryError(f"expected enough memory, found {found}"), pipes)
    finally:
        pipes.close()
        discard_unwritten()
    # Some versions of typer turn Ctrl-C into this code themselves.
    if code == _INTERRUPTED:
        _tell("interrupted")
    sys.exit(code)


def _code_after(error: Exception, pipes: OutputPipes) -> int:
    """Print an error and return the exit code; an output closed by its reader is not printed."""
    if isinstance(error, BrokenPipeError) and pipes.has_lost_reader():
        return _OUTPUT_CLOSED
    if os.environ.get("OVQ_TRACEBACK") or is_verbose():
        raise error
    return _fail(str(error))


def _fail(message: str) -> int:
    """Print one line on standard error; returns the exit code."""
    _tell(f"error: {' '.join(message.split())}")
    return 2


def _tell(text: str) -> None:
    """Print a line on standard error, ignoring a closed pipe."""
    with contextlib.suppress(OSError):
        print(f"ovq: {text}", file=sys.stderr)


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Context manager that prints warnings in one line; with `-v`, with their source location."""
    before = warnings.formatwarning

    def formatted(message: Warning | str, *where: Any, **line: Any) -> str:
        return before(message, *where, **line) if is_verbose() else f"ovq: warning: {message}\n"

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before
