"""The fuzzer's command line: `python -m tests.fuzz --help`."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ovq.runtime.progress import Reporter
from tests.fuzz.backends import BACKENDS
from tests.fuzz.run import KINDS, SHARES, Outcome, report, run

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    backend: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(BACKENDS)}; all by default.")
    ] = None,
    kind: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(KINDS)}; all by default.")] = None,
    calls: Annotated[int, typer.Option(min=1, help="Calls of the op; of the others a share of it.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Programs depend on it and on their number alone.")] = 0,
    seconds: Annotated[float, typer.Option(help="For each backend and kind, at most.")] = float("inf"),
) -> None:
    """Run random programs on every backend; the exit code is 1 if one of them failed."""
    for name, found, known in (("backend", backend, BACKENDS), ("kind", kind, KINDS)):
        if unknown := sorted(set(found or ()) - set(known)):
            raise typer.BadParameter(
                f"expected names among {list(known)}, found {unknown}", param_hint=f"--{name}"
            )
    # One thread: programs are tiny, and threads would only wait for each other.
    torch.set_num_threads(1)
    outcomes = []
    with Reporter() as reporter:
        for name in backend or BACKENDS:
            if reason := BACKENDS[name].missing():
                reporter.say(f"{name}: left out, {reason}")
                continue
            for what in kind or KINDS:
                if what in BACKENDS[name].kinds:
                    outcomes.append(_run(reporter, what, name, calls, seed, seconds))
    Console().print(_table(outcomes, seed))
    raise typer.Exit(1 if any(outcome.failures for outcome in outcomes) else 0)


def _run(reporter: Reporter, kind: str, backend: str, calls: int, seed: int, seconds: float) -> Outcome:
    """One run with a bar; the first failure of each sort is reported at once."""
    total = max(1, round(calls * SHARES[kind]))
    work = reporter.start(f"{kind} on {backend}", total=total)
    shown = set()

    def show(outcome: Outcome) -> None:
        work.update(outcome.num_run, note=f"{outcome.num_failed} failed")
        for sort in outcome.failures.keys() - shown:
            shown.add(sort)
            reporter.say("\n" + report(outcome.failures[sort], outcome))

    return run(kind, backend, calls=total, seed=seed, seconds=seconds, on_progress=show)


def _table(outcomes: list[Outcome], seed: int) -> Table:
    table = Table(title=f"seed {seed}")
    for name in ("backend", "kind", "programs", "failed", "sorts", "seconds"):
        table.add_column(name, justify="left" if name in ("backend", "kind") else "right")
    for outcome in outcomes:
        counts = (outcome.num_run, outcome.num_failed, len(outcome.failures), round(outcome.seconds))
        table.add_row(outcome.backend, outcome.kind, *(f"{n:,}" for n in counts))
    return table


if __name__ == "__main__":
    app()
