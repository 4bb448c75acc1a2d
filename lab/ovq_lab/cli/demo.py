"""`ovq demo`: the main result of the project, from scratch, in minutes."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from ovq.cli.common import check_folder, check_model_path
from ovq.cli.options import number_up_to
from ovq.fields import LARGEST_SEED


def demo(
    out: Annotated[Path, typer.Option(help="Folder for results, figures and the OVQ model.")] = Path(
        "demo-out"
    ),
    seed: Annotated[int, number_up_to(LARGEST_SEED, "Random seed of weights and data.")] = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Seconds instead of minutes, to check that everything runs; the models then learn nothing.",
        ),
    ] = False,
) -> None:
    """Train OVQ, full attention and a sliding window on short recall, and test all three on long recall.

    The OVQ model is also tested with more slots, with the paper's merge rule and with nearest.

    Writes results.json, accuracy.png, state.png and the trained model (ovq/) into the folder.

    Example: [bold]ovq demo --out demo-out[/bold], then [bold]ovq eval --model demo-out/ovq --lengths
        8192[/bold]
    """
    check_folder("--out", out)
    check_model_path("--out", out)

    from ovq.runtime.files import claimed
    from ovq_lab.figures.demo import run_demo

    # Of two at once, one could leave its results beside the model of the other.
    with claimed(out, command="ovq demo"):
        run_demo(out, seed=seed, is_quick=quick)
    # `make demo` runs it in an environment that may not be active; `python -m ovq` names a module.
    name = "ovq" if shutil.which("ovq") else sys.argv[0]
    program = shlex.quote(name) if shutil.which(name) else f"{shlex.quote(sys.executable)} -m ovq"
    model = shlex.quote(str(out / "ovq"))
    typer.echo(
        f"Next, twice as long: {program} eval --model {model} --merge nearest --num-slots 1024 --lengths 8192"
    )
