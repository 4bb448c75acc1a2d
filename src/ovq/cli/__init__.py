"""The command line: `ovq demo | train | eval | generate | context | memory | bench | reproduce`.

Each command is a module of its own, thin: it reads options and calls the library. Bad input ends in one line
on standard error and exit code 2. PyTorch and transformers are imported inside the commands, so that help is
instant.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import ovq
from ovq.cli import bench, context, demo, evaluate, generate, memory, reproduce, train

app = typer.Typer(
    name="ovq",
    help="Online vector-quantized attention: language models that keep a dictionary of what they read.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("train")(train.train)
app.add_typer(evaluate.app, name="eval")
app.command("generate")(generate.generate)
app.add_typer(context.app, name="context")
app.command("memory")(memory.memory)
app.command("bench")(bench.bench)
app.command("reproduce")(reproduce.reproduce)

# Newer typer ships its own copy of click; this is the usage error of whichever it runs on.
_UsageError = typer.BadParameter.__base__

# What a shell reports of a program that Ctrl-C has ended.
_INTERRUPTED = 130


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"ovq {ovq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # The options are those of the callback above; nothing is left to do.
    del version


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 if all went well, 2 after bad input, 130 after Ctrl-C.

    Set `OVQ_TRACEBACK=1` to see where an error comes from instead of its one line.

    Args:
        arguments: The command line without the program's name; that of the process if not given.
    """
    try:
        code = app(args=arguments, standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message())
    except BrokenPipeError:
        # The reader of a pipe (`ovq memory ... | head`) has seen enough. The exit would flush into the pipe
        # again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError) as error:
        if os.environ.get("OVQ_TRACEBACK"):
            raise
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    # Some versions of typer turn Ctrl-C into the code themselves.
    if code == _INTERRUPTED:
        print("ovq: interrupted", file=sys.stderr)
    sys.exit(code)


def _fail(message: str) -> None:
    """Print one line on standard error and exit with code 2."""
    print("ovq: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
