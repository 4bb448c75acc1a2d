"""`ovq eval`: accuracy of a trained model by length and size of the dictionary; tests of language models."""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from pathlib import Path
from typing import Annotated

import typer

from ovq.cli.common import given_options, parse_ints, print_table
from ovq.cli.loading import check_model_folder, load_model
from ovq.cli.options import Json, LognLength, StateDtype, number_up_to
from ovq.fields import LARGEST_SEED
from ovq_lab.cli import dictionaries, eval_harness, eval_lm, eval_needle
from ovq_lab.cli.results import as_json, model_names

app = typer.Typer(
    invoke_without_command=True, subcommand_metavar="[lm|needle|harness]", rich_markup_mode="rich"
)
app.command("lm")(eval_lm.language)
app.command("needle")(eval_needle.needle)
app.command("harness")(eval_harness.harness)


@app.callback()
def evaluate(
    context: typer.Context,
    model: Annotated[
        list[Path] | None, typer.Option(help="Folder of a trained model; can be given several times.")
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Tokens per example, one test for each length.")
    ] = "256,1024,4096",
    num_slots: dictionaries.Sizes = None,
    merge: dictionaries.Rules = None,
    logn_length: LognLength = None,
    state_dtype: StateDtype = None,
    examples: Annotated[int, typer.Option(min=1, help="Examples per length.")] = 64,
    seed: Annotated[int, number_up_to(LARGEST_SEED, "Seed of the test data.")] = 0,
    json_: Json = False,
) -> None:
    """Test models on the synthetic task they were trained on.

    Example: [bold]ovq eval --model runs/ovq --lengths 256,1024,4096 --num-slots 64,256,1024
        --merge existing,nearest[/bold]

    Language models have tests of their own, named before their options: [bold]ovq eval lm[/bold], [bold]ovq
    eval needle[/bold] and [bold]ovq eval harness[/bold].
    """
    if context.invoked_subcommand is not None:
        if given := sorted(given_options(context)):
            name = context.invoked_subcommand
            raise ValueError(
                f"eval {name}: expected options after {name}, found {', '.join(given)} before it"
            )
        return
    if not model:
        raise ValueError("Missing option '--model'")
    at_lengths = parse_ints(lengths, flag="--lengths")
    tested = dictionaries.parse(num_slots, merge)
    for folder in model:
        check_model_folder(folder)
    from transformers import set_seed

    from ovq_lab.tasks import TextTask
    from ovq_lab.train.config import RunConfig

    tasks = []
    for folder in model:
        found = RunConfig.load(folder).task
        if isinstance(found, TextTask):
            raise ValueError(f"{folder}: expected a run on a synthetic task, found one on text: ovq eval lm")
        tasks.append(found)
        if found != tasks[0]:
            raise ValueError(f"{folder}: expected the task of {model[0]}, {tasks[0]}, found {found}")
    task = tasks[0]
    for length in at_lengths:
        task.at_length(length)

    from ovq.runtime.progress import Reporter
    from ovq_lab.eval.accuracy import evaluate as evaluate_model
    from ovq_lab.plots.tables import result_table, slice_table

    rows = []
    with Reporter() as reporter:
        for folder, name in zip(model, model_names(model), strict=True):
            # For each model, so that its row does not depend on the others.
            set_seed(seed)
            rows += evaluate_model(
                load_model(folder, logn_length=logn_length, state_dtype=state_dtype),
                task,
                lengths=at_lengths,
                **tested,
                num_examples=examples,
                seed=seed,
                reporter=reporter,
                name=name,
            )
    if json_:
        results = {"models": list(map(str, model)), "rows": [dataclasses.asdict(row) for row in rows]}
        typer.echo(as_json(results))
        return
    print_table(result_table(rows, title=f"{task.name}: share of right answers by length in tokens"))
    in_brackets = ""
    if task.error_name is not None:
        print_table(
            result_table(
                rows,
                title=f"{task.name}: {task.error_name} by length in tokens",
                value=attrgetter("mean_error"),
            )
        )
        in_brackets = f" ({task.error_name})"
    title = f"{task.name} at {max(at_lengths)} tokens, by slice: share of right answers{in_brackets}"
    print_table(slice_table(rows, title=title))
