"""`ovq eval needle`: needle-in-a-haystack retrieval of language models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ovq.cli.common import check_folder, flag_of, parse_ints
from ovq.cli.loading import check_any_model_folder, load_any_model
from ovq.cli.options import Json, LognLength, StateDtype
from ovq_lab.cli import corpus, dictionaries
from ovq_lab.cli.results import Models, PieceSize, model_names, show_results, text_tokenizer


def needle(
    model: Models,
    lengths: Annotated[
        str, typer.Option(help="Most tokens of text, question and answer together.")
    ] = "1024,4096",
    depths: Annotated[
        str, typer.Option(help="Percentages of the text that come before the needle.")
    ] = "0,25,50,75,100",
    haystack: Annotated[
        str, typer.Option(help="Text around the needle: noise (the same five sentences) or essay.")
    ] = "noise",
    value: Annotated[str, typer.Option(help="What is hidden: word, number or uuid.")] = "number",
    dataset: corpus.Dataset = None,
    split: corpus.Split = "test",
    held_out: corpus.HeldOut = None,
    subset: corpus.Subset = None,
    hub_split: corpus.HubSplit = None,
    text_field: corpus.TextField = None,
    max_documents: corpus.MaxDocuments = None,
    num_slots: dictionaries.Sizes = None,
    merge: dictionaries.Rules = None,
    logn_length: LognLength = None,
    state_dtype: StateDtype = None,
    examples: Annotated[int, typer.Option(min=1, help="Questions per length and depth.")] = 5,
    distractors: Annotated[int, typer.Option(min=1, help="Wrong values to compare the right one with.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the questions.")] = 0,
    piece_size: PieceSize = 2048,
    out: Annotated[
        Path | None, typer.Option(help="Folder for needle.json and heat maps needle_*.png.")
    ] = None,
    json_: Json = False,
) -> None:
    """Hide a sentence in a long text and ask for it, by length and depth.

    Each cell shows three fractions: values that greedy generation produces; tokens of values that the model
    ranks first; and values that are more likely than all --distractors others.

    Essays consist of documents that the first model was not trained on, or of another --dataset.

    Example: [bold]ovq eval needle --model runs/ovq --lengths 1024,4096 --depths 0,50,100 --haystack essay
    --dataset sotu --value uuid --out results[/bold]
    """
    at_lengths = parse_ints(lengths, flag="--lengths")
    at_depths = _parse_depths(depths)
    tested = dictionaries.parse(num_slots, merge)
    chosen = {"held_out": held_out, "subset": subset, "hub_split": hub_split}
    chosen |= {"text_field": text_field, "max_documents": max_documents}
    if haystack != "essay":
        for name, option in {"dataset": dataset, **chosen}.items():
            if option is not None:
                raise ValueError(f"{flag_of(name)}: expected only with --haystack essay, found {option!r}")
    for folder in model:
        check_any_model_folder(folder)
    check_folder("--out", out)

    from ovq_lab.plots.needle import needle_table, save_needle_figures
    from ovq_lab.text.documents import digest_of
    from ovq_lab.text.haystack import NeedleBuilder, essay_texts

    source = corpus.corpus_to_read(model[0], dataset, **chosen) if haystack == "essay" else None
    texts = [] if source is None else essay_texts(source, split, max(at_lengths))
    from ovq.runtime.progress import Reporter
    from ovq_lab.eval.needle import evaluate_needle

    rows, trained_on = [], []
    with Reporter() as reporter:
        for folder, name in zip(model, model_names(model), strict=True):
            trained_on.append(corpus.count_trained_on(folder, [*map(digest_of, texts)], reporter))
            builder = NeedleBuilder(
                text_tokenizer(folder),
                haystack=haystack,
                value=value,
                num_distractors=distractors,
                texts=texts,
            )
            rows += evaluate_needle(
                load_any_model(folder, logn_length=logn_length, state_dtype=state_dtype),
                builder,
                lengths=at_lengths,
                depths=at_depths,
                **tested,
                num_examples=examples,
                seed=seed,
                piece_size=piece_size,
                reporter=reporter,
                name=name,
            )
    of_training = " trained on" if any(trained_on) else ""
    title = f"A {value} in {haystack}{of_training}: generated, token accuracy, choice of {distractors + 1}"
    show_results(
        {
            "models": list(map(str, model)),
            "source": None if source is None else corpus.described_corpus(source),
            "split": split,
            "num_documents": len(texts),
            "num_trained_on": trained_on,
            "seed": seed,
        },
        rows,
        tables=(needle_table(rows, title=title),),
        draw=save_needle_figures,
        out=None if out is None else out / "needle.json",
        is_json=json_,
    )


def _parse_depths(text: str) -> list[float]:
    """Parse percentages as shares, without duplicates.

    Example:
        >>> _parse_depths("0, 12.5,100,0")
        [0.0, 0.125, 1.0]
    """
    try:
        depths = [float(part) / 100 for part in text.split(",")]
    except ValueError:
        depths = [-1.0]
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"--depths: expected numbers from 0 to 100 with commas between them, found {text!r}")
    return list(dict.fromkeys(depths))
