"""Shared by the tests of language models: options, display of results, names and tokenizers of models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.cli.common import print_table
from ovq.cli.loading import load_any_config, load_tokenizer

if TYPE_CHECKING:
    from rich.table import Table

Models = Annotated[
    list[Path],
    typer.Option(help="Folder of a trained, converted or pretrained model; can be given several times."),
]
PieceSize = Annotated[int, typer.Option(min=1, help="Tokens read at a time; fewer need less memory.")]


def as_json(content: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Indented JSON; null in place of NaN and infinity, which JSON lacks: losses of a model that diverged.

    Objects that JSON cannot hold are those that `default` gives for them.
    """
    text = json.dumps(content, default=default)
    return json.dumps(json.loads(text, parse_constant=lambda name: None), indent=2)


def show_results(
    about: dict[str, Any],
    rows: Sequence[Any],
    *,
    tables: Sequence[Table],
    draw: Callable[[Sequence[Any], Path], list[Path]],
    out: Path | None,
    is_json: bool,
) -> None:
    """Print results, which are dataclasses, as tables or as JSON with `about` beside the rows.

    If there is an output file, the JSON is written there, and figures of the rows are drawn into its folder,
    which is created if necessary.
    """
    results = as_json(about | {"rows": [dataclasses.asdict(row) for row in rows]})
    paths = []
    if out is not None:
        from ovq.runtime.files import write_atomic

        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, results + "\n")
        paths = [out, *draw(rows, out.parent)]
    if is_json:
        print(results)
        return
    for table in tables:
        print_table(table)
    if paths:
        typer.echo(f"Wrote {', '.join(map(str, paths))}")


def text_tokenizer(folder: Path) -> Any:
    """The tokenizer saved with a model that reads text."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{folder}: expected a tokenizer beside the model, found none: it reads no text")
    return tokenizer


def model_names(folders: Sequence[Path]) -> list[str]:
    """Names for models in one table: empty if their mixers differ, otherwise the names of their folders, or
    whole paths if names repeat.
    """
    from ovq_lab.eval.models import long_range_mixer

    configs = [load_any_config(folder) for folder in folders]
    if len({long_range_mixer(config) for config in configs}) == len(folders):
        return [""] * len(folders)
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
