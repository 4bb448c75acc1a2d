"""`ovq train`: train a model by a recipe, or resume a run."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ovq.cli.common import check_folder, check_model_path

if TYPE_CHECKING:
    from ovq_lab.tasks import Task
    from ovq_lab.train.config import RunConfig


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A file of your own (.yaml, .json), or TASK-MIXER, such as recall-ovq. Tasks: recall, "
            "positional, regression, mqar, lm; for GPUs lm-70m, lm-120m, lm-150m, lm-350m, lm-480m. "
            "Mixers: ovq, full, fox, sliding, sinks, vq, kvm, raven, linear, gdn, kda, mesanet, "
            "mamba2; of lm also ovq-mamba2."
        ),
    ] = None,
    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="SECTION.FIELD=VALUE",
            help="Change a field of the recipe; can be given several times.",
        ),
    ] = [],  # noqa: B006  (typer reads it and never changes it)
    task: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:CLASS",
            help="A task of your own instead of the recipe's: a class that inherits ovq_lab.tasks.Task.",
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Start from the weights of this saved model, with a new optimizer."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/RECIPE.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out from its last checkpoint, or from its start if it has none.",
        ),
    ] = False,
) -> None:
    """Train a model and save it with its configuration.

    Example: [bold]ovq train recall-ovq --set train.steps=300 --set model.num_slots=128 --out runs/ovq[/bold]

    On text (a file, a folder, an installed corpus or a data set of the hub): [bold]ovq train lm-ovq --set
    task.dataset=books/[/bold]

    From a file of your own, and from the weights of a model: [bold]ovq train mine.yaml --init-from
    runs/ovq[/bold]

    On a task of your own: [bold]ovq train recall-ovq --task mytasks:Sort[/bold]; later, [bold]ovq eval
    --import mytasks --model runs/recall-ovq[/bold]

    With [bold]--set train.save_every=100[/bold] the run keeps checkpoints, and [bold]ovq train --resume --out
    runs/ovq[/bold] continues it after an interruption. With several processes: [bold]torchrun
    --nproc-per-node 2 -m ovq train ...[/bold]; with [bold]--set train.sharding=fsdp[/bold] each holds a part
    of the model.
    """
    others = (recipe, task, init_from)
    if resume and (set_ or any(other is not None for other in others)):
        raise ValueError("--resume: expected only --out beside it (a run continues as it was configured)")
    if resume and out is None:
        raise ValueError("--resume: expected the folder of the run in --out, found no --out")
    if not resume and recipe is None:
        raise ValueError("expected a recipe, or --resume, found neither; see ovq train --help")

    # These imports are light: a misspelt field is reported before PyTorch is imported.
    from ovq_lab.text.readers import local_path
    from ovq_lab.train.recipe_file import ENDINGS, load_recipe
    from ovq_lab.train.recipes import get_recipe

    config = None
    if recipe is not None:
        config = load_recipe(Path(recipe)) if recipe.endswith(ENDINGS) else get_recipe(recipe)
        if task is not None:
            config = dataclasses.replace(config, task=_own_task(task))
        config = config.override(set_)
        source = config.train.init_from if init_from is None else init_from
        if source is not None and (path := local_path(source)).exists():
            # A run may be resumed from elsewhere.
            source = str(path.resolve())
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=source))
        out = out or Path("runs") / Path(recipe).stem
    assert out is not None
    check_folder("--out", out)
    check_model_path("--out", out)

    from ovq.runtime.progress import Reporter
    from ovq_lab.runtime.allocator import keep_freed_memory
    from ovq_lab.tasks import TextTask
    from ovq_lab.train import loop
    from ovq_lab.train.card import save_run_card
    from ovq_lab.train.config import RunConfig
    from ovq_lab.train.history import History
    from ovq_lab.train.sharding import is_first_process

    if resume and loop.has_ended(out):
        if is_first_process():
            typer.echo(f"{out}: the run has ended, and nothing is left to do.")
        return

    keep_freed_memory()

    with Reporter() as reporter:
        if config is None:
            model = loop.resume(out, reporter=reporter, label=f"train {out}")
        else:
            model = loop.train(config, out, reporter=reporter, label=f"train {recipe}")
    if is_first_process():
        config = RunConfig.load(out)
        save_run_card(model, config, out, picture=_draw_losses(config, out))
        diverged = [step for step, loss in History.load(out).training.items() if not math.isfinite(loss)]
        if diverged:
            raise ValueError(
                f"{out}: expected finite losses, found none from step {diverged[0]:,} on; the model is "
                f"saved as it is: train with less than train.learning_rate={config.train.learning_rate:g}"
            )
        is_text = config.task.name == TextTask.name
        test = f"ovq eval {'lm ' if is_text else ''}--model {shlex.quote(str(out))}"
        typer.echo(
            f"Saved the model and its configuration in {out}. Test it: {test}"
            f"{_text_to_read(out) if is_text else ''}{_modules_to_import(config)}{_rules_to_test(config)}"
        )


def _own_task(path: str) -> Task:
    """A task of the user's with its defaults, which is registered by its name."""
    from ovq.plugins import import_module
    from ovq_lab.tasks import register_task

    try:
        module, colon, name = path.partition(":")
        if not (colon and name and module):
            raise ValueError(f"expected module:Class, found {path!r}")
        cls = getattr(import_module(module), name, None)
        if cls is None:
            raise ValueError(f"expected a class {name} in {module}, found none")
        register_task(cls)
        return cls()
    except (TypeError, ValueError) as error:
        raise ValueError(f"--task {path}: {error}") from error


def _modules_to_import(config: RunConfig) -> str:
    """The `--import` of a test of this run: the modules of its task and mixers that are the user's own."""
    from ovq.layers.registry import mixer_class
    from ovq.plugins import modules_of_users

    classes = [type(config.task), *map(mixer_class, config.model.mixer_types)]
    return "".join(f" --import {name}" for name in modules_of_users(classes))


def _text_to_read(out: Path) -> str:
    """The options with which `ovq eval lm` finds text to test this run on, where its defaults find none."""
    from ovq_lab.cli.eval_lm import LENGTHS
    from ovq_lab.train.data import longest_test_text

    longest = longest_test_text(out)
    if longest is None or longest >= max(LENGTHS):
        return ""
    if not longest:
        return " --dataset FILE --split all"
    return f" --lengths {','.join(str(n) for n in LENGTHS if n <= longest) or longest}"


def _rules_to_test(config: RunConfig) -> str:
    """The `--merge` option to test this run with: its own rule, and the rule with the best recall."""
    from ovq.ops.options import BEST_MERGE, can_merge_best

    model = config.model
    if "ovq" not in model.mixer_types or not can_merge_best(model.merge, init=model.init, rate=model.rate):
        return ""
    return f" --merge {model.merge},{BEST_MERGE}"


def _draw_losses(config: RunConfig, out: Path) -> Path | None:
    """Draw the losses into the folder of the run; None without matplotlib."""
    try:
        from ovq_lab.plots.training import save_loss_curve
    except ImportError:
        return None
    return save_loss_curve(out, mixer=config.mixer)
