"""`ovq publish`: a folder of a trained model for the hub, with evaluation results in its card."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ovq.cli.common import check_new_folder
from ovq.cli.loading import check_model_folder, load_model, load_tokenizer

_PICTURE = "loss.png"


def publish(
    model: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    out: Annotated[Path, typer.Option(help="Folder to make; the model is named after it.")],
    results: Annotated[
        list[Path],
        typer.Option(
            help="Results of ovq eval for this model: lm.json, needle.json or harness.json of its --out, "
            "or what --json printed (not of harness); can be given several times."
        ),
    ] = [],  # noqa: B006  (typer reads it and never changes it)
    license_: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="License of the weights, by its name on the hub: apache-2.0, mit, cc-by-4.0, ...",
        ),
    ] = None,
) -> None:
    """Make a folder that can be uploaded to the hub as it is: weights, tokenizer, code to load them, and a
    card with results. Nothing is uploaded.

    Checkpoints, logs and optimizer states are left out. A card that you edited is copied unchanged.

    Example: [bold]ovq eval lm --model runs/lm-ovq --out results[/bold], then [bold]ovq publish --model
    runs/lm-ovq --results results/lm.json --license apache-2.0 --out my-model[/bold]
    """
    if license_ is not None and not license_.strip():
        raise ValueError(f"--license: expected a licence as the hub names it, found {license_!r}")
    check_model_folder(model)
    check_new_folder("--out", out)
    from transformers.trainer import TRAINER_STATE_NAME

    from ovq_lab.train.config import CONFIG_FILE, RunConfig

    # Validated before anything is loaded.
    config = RunConfig.load(model)
    # A checkpoint has a state, too, but its configuration is that of the folder around it.
    if not all((model / name).is_file() for name in (CONFIG_FILE, TRAINER_STATE_NAME)):
        raise ValueError(f"--model: expected a run that has ended, found none in {model}")

    from ovq.hf.card import CARD_FILE, is_untouched
    from ovq.runtime.files import atomic_folder
    from ovq_lab.eval.report import results_as_markdown
    from ovq_lab.train.card import save_run_card

    card = model / CARD_FILE
    is_edited = card.is_file() and not is_untouched(card.read_text(encoding="utf-8", errors="replace"))
    if is_edited and license_ is not None:
        raise ValueError(f"--license: expected none, as {card} was edited and stays, found {license_!r}")
    tables = "\n\n".join(results_as_markdown(path, model=model) for path in results)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    picture = model / _PICTURE
    with atomic_folder(out) as folder:
        loaded.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        shutil.copy(model / CONFIG_FILE, folder)
        if picture.is_file():
            shutil.copy(picture, folder)
        if is_edited:
            shutil.copy(card, folder)
        else:
            save_run_card(
                loaded,
                config,
                model,
                picture=picture if picture.is_file() else None,
                out=folder,
                name=out.resolve().name,
                results=tables or None,
                license=license_,
            )
    if is_edited:
        to_add = " Results to add to it:" if tables else ""
        typer.echo(f"{card} was edited and is copied as it is.{to_add}\n{tables}")
    names = [shlex.quote(name) for name in (f"YOU/{out.resolve().name}", str(out))]
    typer.echo(f"Made {out}. Upload it: hf upload {' '.join(names)}")
