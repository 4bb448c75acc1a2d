"""Reading and checking options, shared by the commands: ValueErrors name the flag."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.cells import cell_len
from rich.console import Console

if TYPE_CHECKING:
    from rich.table import Table

out_console = Console(markup=False, emoji=False)
"""For text on standard output. Lines with paths are printed by `typer.echo`, which does not wrap them."""


def print_table(table: Table) -> None:
    """Print a table on standard output; its lines are wider than a terminal in which it would lose digits."""
    for column in table.columns:
        text = "\n".join(map(str, [column.header, *column.cells]))
        column.min_width = max(map(cell_len, text.split("\n" if column.no_wrap else None)), default=0)
    # Wide enough for all columns when the output goes to a file or a pipe.
    width = out_console.width if out_console.is_terminal else 150
    least = out_console.measure(table, options=out_console.options.update(max_width=10**6)).minimum
    Console(width=max(width, least), markup=False, emoji=False).print(table, crop=False)


def given_options(context: typer.Context) -> set[str]:
    """Names of the options given on the command line, even if with their default values."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def flag_of(name: str) -> str:
    """The option of a parameter: `"--num-slots"` for `"num_slots"`."""
    return f"--{name.replace('_', '-')}"


def parse_ints(text: str, *, flag: str) -> list[int]:
    """Parse a list of positive integers such as `"256,1024"`; duplicates are dropped. Errors name the flag.

    Example:
        >>> parse_ints("256, 1024", flag="--lengths"), parse_ints("64,64", flag="--num-slots")
        ([256, 1024], [64])
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{flag}: expected positive integers with commas between them, found {text!r}")
    return list(dict.fromkeys(map(int, parts)))


def read_text(source: str, *, flag: str) -> str:
    """The text in a file, or on standard input for `"-"`, without a byte order mark, as editors on Windows
    write it. ValueError, naming the flag, if it cannot be read or is not in UTF-8.

    Example:
        >>> read_text("no", flag="--text")
        Traceback (most recent call last):
        ValueError: --text: expected a text file, found none that can be read: no (No such file or directory)
    """
    name = "standard input" if source == "-" else source
    try:
        return sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"{flag}: expected a text file, found none that can be read: {name} ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{flag}: expected text in UTF-8, found other bytes in {name} (from byte {error.start:,} on)"
        ) from None


def as_text(argument: str, *, flag: str) -> str:
    """A command-line argument as text, decoded as UTF-8 if the system's locale could not decode it.

    Example:
        >>> as_text("\\udcc3\\udcbc", flag="--prompt")  # what Python makes of it where LC_ALL=C
        'ü'
    """
    if argument.isascii():
        return argument
    try:
        return argument.encode("utf-8", "surrogateescape").decode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise ValueError(
            f"{flag}: expected text in UTF-8, found other bytes (from byte {error.start:,} on)"
        ) from None


def check_file(flag: str, path: Path, *, text: str | None = None) -> None:
    """Check that a file can be written, before hours of work whose result could not be saved.

    It must not be `text`, the file that was read. OSError if its folder is not writable.

    Example:
        >>> check_file("--out", Path("no/such/folder/page.html"))
        Traceback (most recent call last):
        ValueError: --out: expected a file in a folder that exists, found no/such/folder/page.html
    """
    # The file is written to where a link points.
    parent = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    # A device or a pipe would be replaced by a file.
    if (path.exists() and not path.is_file()) or not parent.is_dir():
        raise ValueError(f"{flag}: expected a file in a folder that exists, found {path}")
    if text is not None and path.exists() and Path(text).exists() and path.samefile(text):
        raise ValueError(f"{flag}: expected another file than the text that was read, found {path}")
    _check_writable(parent)


def check_folder(flag: str, path: Path | None) -> None:
    """Check that files can be written to a folder, which need not exist yet; None for no folder.

    Example:
        >>> check_folder("--out", Path("no/such/folder"))  # it can be made
        >>> check_folder("--out", None)
    """
    if path is None:
        return
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    if not place.is_dir():
        raise ValueError(f"{flag}: expected a folder, found a file: {place}")
    _check_writable(place)


def check_new_folder(flag: str, path: Path) -> None:
    """Check that a model can be saved to a new folder at this path.

    Example:
        >>> check_new_folder("--out", Path("no/such/folder"))
        Traceback (most recent call last):
        ValueError: --out: expected a folder in one that exists, found no/such/folder
    """
    if os.path.lexists(path):
        raise ValueError(f"{flag}: expected a folder that does not exist yet, found {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{flag}: expected a folder in one that exists, found {path}")
    check_model_path(flag, path)
    _check_writable(path.parent)


def check_model_path(flag: str, path: Path) -> None:
    """Check that a path is UTF-8 text, which the library that writes weights requires.

    Example:
        >>> check_model_path("--out", Path("caf\\udce9"))
        Traceback (most recent call last):
        ValueError: --out: expected a path in UTF-8, in which weights can be saved, found b'caf\\xe9'
    """
    try:
        # Relative paths are made absolute when weights are saved.
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{flag}: expected a path in UTF-8, in which weights can be saved, found {os.fsencode(path)!r}"
        ) from None


def _check_writable(folder: Path) -> None:
    """Raise OSError, naming the folder, unless files can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        # The temporary file's name means nothing to the user.
        raise OSError(error.errno, error.strerror, str(folder)) from error
