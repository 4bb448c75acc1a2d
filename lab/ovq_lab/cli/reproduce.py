"""`ovq reproduce`: reproduce the figures of the project."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ovq.cli.common import check_folder, check_model_path, print_table


def reproduce(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Figures to make, see --list; 'rivals' stands for all that begin with it.",
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="cpu: about an hour per figure on two cores. gpu: hours on one H100.")
    ] = "cpu",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each run.")] = 3,
    dataset: Annotated[
        str | None, typer.Option(help="Corpus of language models and needles; default: that of the preset.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Fraction of its documents that is not trained on.")
    ] = None,
    mixer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Compare this mixer too, perhaps one of your own (--import); can be given several times.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results; default: reproduce-out/PRESET.")
    ] = None,
    lines: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="Make only these lines of a figure, and keep the others of its JSON file, if any, in "
            "--out; * stands for any text; can be given several times.",
        ),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the figures and exit.")] = False,
    all_: Annotated[bool, typer.Option("--all", help="Make every figure.")] = False,
    draw: Annotated[
        Path | None,
        typer.Option(help="Draw the figures in a folder of results again from its JSON files, and exit."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write OUT/report.html, one page with all results in OUT.")
    ] = False,
    tables: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Fill in the marked tables of a Markdown file from results; can be given several times.",
        ),
    ] = None,
) -> None:
    """Train and evaluate the models of a figure, and write its rows (JSON) and the figure (PNG).

    Finished work is never repeated: after an interruption, the same command continues where it stopped. If
    other code has done it, a line says what to delete to do it again.
    Figures that need the same trained model share it.

    Example: [bold]ovq reproduce recall --preset cpu --seeds 3 --report[/bold]
    """
    names = names or []
    if draw is not None:
        if names or all_ or list_ or report or tables:
            raise ValueError("--draw: expected a folder of results and nothing else")
        from ovq_lab.figures.redraw import redraw

        for path in redraw(draw):
            typer.echo(f"Wrote {path}")
        return
    if list_ and (names or all_ or lines or report or tables):
        raise ValueError("--list: expected no figure and no other output beside it")
    if (names and all_) or not (names or all_ or list_ or report or tables):
        raise ValueError(
            "expected names of figures, or one of --all, --list, --draw, --report, --tables; "
            "see ovq reproduce --list"
        )
    if mixer and not (names or all_):
        raise ValueError("--mixer: expected names of figures beside it, found none")
    from ovq_lab.figures.figures import FIGURES, GROUPS, get_figure

    names = [figure for name in names for figure in GROUPS.get(name, (name,))]
    if lines and len(names) != 1:
        raise ValueError(f"--lines: expected the name of one figure beside it, found {len(names)}")
    from ovq_lab.figures.presets import get_preset

    sizes = get_preset(preset)
    figures = [
        get_figure(name, sizes, dataset=dataset, held_out=held_out, mixers=mixer or ())
        for name in (FIGURES if all_ or list_ else dict.fromkeys(names))
    ]
    if list_:
        _print_list(figures, num_seeds=seeds)
        return
    if figures and sizes.needs_gpu:
        import torch

        if not torch.cuda.is_available():
            raise ValueError(f"--preset {sizes.name}: expected a CUDA device, found none")
    out = out or Path("reproduce-out") / sizes.name
    check_folder("--out", out)
    check_model_path("--out", out)

    from ovq.runtime.files import claimed
    from ovq.runtime.progress import Reporter
    from ovq_lab.figures.engine import Workshop
    from ovq_lab.figures.engine import reproduce as make
    from ovq_lab.figures.page import write_report

    if figures:
        with claimed(out, command="ovq reproduce"), Reporter(is_long=True) as reporter:
            shop = Workshop(
                out=out, preset=sizes.name, num_seeds=seeds, num_workers=sizes.num_workers, reporter=reporter
            )
            for figure in figures:
                make(figure, shop, lines=lines or ())
                # Paths stay on one line, so that they can be copied.
                reporter.say(
                    f"Wrote {out / 'rows' / figure.name}.json and {out / 'figures' / figure.name}.png"
                )
    if report:
        typer.echo(f"Wrote {write_report(out)}")
    if tables:
        from ovq_lab.figures.tables import update_tables

        changed = update_tables(tables)
        for path in tables:
            typer.echo(f"Wrote {path}" if path in changed else f"{path} is up to date")


def _print_list(figures: list[Any], *, num_seeds: int) -> None:
    from rich.table import Table

    from ovq_lab.figures.plan import count_runs

    table = Table(title="Figures")
    table.add_column("name", no_wrap=True)
    table.add_column("what it shows")
    table.add_column("models to train", justify="right")
    for figure in figures:
        table.add_row(figure.name, figure.title, f"{count_runs(figure, num_seeds)}")
    print_table(table)
