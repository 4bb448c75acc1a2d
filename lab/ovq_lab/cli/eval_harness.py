"""`ovq eval harness`: tasks of EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from ovq.cli import options
from ovq.cli.common import check_folder, parse_ints
from ovq.cli.loading import check_any_model_folder, load_any_model
from ovq_lab.cli.results import as_json, text_tokenizer


def harness(
    model: Annotated[list[Path], typer.Option(help="Folder of a trained, converted or pretrained model.")],
    tasks: Annotated[str, typer.Option(help="Names of tasks, with commas between them.")],
    num_slots: options.NumSlots = None,
    merge: options.MergeRule = None,
    logn_length: options.LognLength = None,
    state_dtype: options.StateDtype = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples per question.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests per batch.")] = 1,
    max_length: Annotated[
        int, typer.Option(min=2, help="Most tokens per request; longer ones lose their beginning.")
    ] = 8192,
    limit: Annotated[int | None, typer.Option(min=1, help="Most examples of each task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with your own tasks.")] = None,
    ruler_lengths: Annotated[str | None, typer.Option(help="Tokens of the tasks of RULER.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for harness.json, with all samples.")] = None,
    json_: options.Json = False,
) -> None:
    """Run tasks of the lm-evaluation-harness (pip install './lab\\[harness]').

    The harness's own tasks read their data from the hub. To use all options of the harness: [bold]lm_eval
    --model hf --model_args pretrained=DIR,trust_remote_code=True --tasks ...[/bold]

    Example: [bold]ovq eval harness --model runs/ovq --tasks piqa,hellaswag,arc_easy --batch-size 8[/bold]
    """
    lengths = None if ruler_lengths is None else parse_ints(ruler_lengths, flag="--ruler-lengths")
    if len(model) > 1:
        raise ValueError(f"--model: expected one folder, found {', '.join(map(str, model))}")
    (folder,) = model
    check_any_model_folder(folder)
    check_folder("--out", out)
    names = [name.strip() for name in tasks.split(",")]

    from ovq.runtime.files import write_atomic
    from ovq_lab.eval.harness import evaluate_tasks

    # Tasks that build their data load the tokenizer themselves.
    metadata: dict[str, Any] = {"tokenizer": str(folder)}
    if lengths is not None:
        metadata["max_seq_lengths"] = lengths
    # Some tasks print progress; standard output is for results only.
    with redirect_stdout(sys.stderr):
        results = evaluate_tasks(
            load_any_model(
                folder, num_slots=num_slots, merge=merge, logn_length=logn_length, state_dtype=state_dtype
            ),
            text_tokenizer(folder),
            names,
            batch_size=batch_size,
            max_length=max_length,
            num_fewshot=num_fewshot,
            limit=limit,
            include_path=include_path,
            metadata=metadata,
        )
    from lm_eval.utils import handle_non_serializable, make_table

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        # The results of the harness contain functions and NumPy numbers.
        saved = as_json({"model": str(folder)} | results, handle_non_serializable)
        write_atomic(out / "harness.json", saved + "\n")
    if json_:
        typer.echo(as_json(results["results"], handle_non_serializable))
        return
    typer.echo(make_table(results))
