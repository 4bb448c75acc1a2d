"""What the tests of language models share: showing results, names and tokenizers of models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ovq.cli.common import out_console
from ovq.cli.loading import load_any_config, load_tokenizer

if TYPE_CHECKING:
    from rich.table import Table


def show_results(
    about: dict[str, Any],
    rows: Sequence[Any],
    *,
    tables: Sequence[Table],
    draw: Callable[[Sequence[Any], Path], list[Path]],
    out: Path | None,
    is_json: bool,
) -> None:
    """Print results as tables or as JSON; if there is an output folder, write JSON and figures to it.

    Args:
        about: What the JSON contains beside the rows.
        rows: Dataclasses.
        tables: The rows as tables for the terminal.
        draw: Draws figures of the rows into a folder; returns their paths.
        out: The JSON file; the figures go to its folder, which is created if necessary.
        is_json: Print the JSON instead of the tables.
    """
    results = json.dumps(about | {"rows": [dataclasses.asdict(row) for row in rows]}, indent=2)
    paths = []
    if out is not None:
        from ovq.runtime.files import write_atomic

        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, results + "\n")
        paths = [out, *draw(rows, out.parent)]
    if is_json:
        print(results)
        return
    # Wide enough for all columns when the output goes to a file or a pipe.
    console = out_console if out_console.is_terminal else Console(width=140)
    for table in tables:
        console.print(table)
    if paths:
        # A path broken over two lines could not be copied.
        console.print(f"Wrote {', '.join(map(str, paths))}", soft_wrap=True, highlight=False)


def text_tokenizer(folder: Path) -> Any:
    """The tokenizer saved with a model that reads text.

    Raises:
        ValueError: If there is none.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder}: expected a tokenizer beside the model, found none: it reads no text")
    return tokenizer


def model_names(folders: Sequence[Path]) -> list[str]:
    """Names for models in one table: empty where their mixers tell them apart, otherwise the names of their
    folders, or whole paths where names repeat.
    """
    from ovq_lab.eval.models import long_range_mixer

    configs = [load_any_config(folder) for folder in folders]
    if len({long_range_mixer(config) for config in configs}) == len(folders):
        return [""] * len(folders)
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
