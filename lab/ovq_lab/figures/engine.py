"""Making a figure: choose hyperparameters, train and evaluate what is missing, collect the rows, draw."""

from __future__ import annotations

import dataclasses
import math
import operator
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ovq.layers.registry import mixer_class
from ovq.runtime.progress import Reporter
from ovq_lab.figures.evaluations import Evaluation
from ovq_lab.figures.jobs import Job, MeasureJob, RunJob, do_job
from ovq_lab.figures.partial import chosen_lines, earlier_results, joined_results
from ovq_lab.figures.plan import Figure, Line, Trial, run_name, with_seed, with_trial
from ovq_lab.figures.results import load_results, save_results
from ovq_lab.runtime.environment import code_of, environment
from ovq_lab.runtime.workers import run_jobs
from ovq_lab.train.config import RunConfig

# Trials are judged on other data seeds than those that are reported.
_VALIDATION_SEEDS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workshop:
    """Output folder and execution settings of figures.

    Attributes:
        num_seeds: Repetitions of each run; their seeds are 0, 1 and so on.
        num_workers: Parallel runs; `None` for as many as there are usable cores.
    """

    out: Path
    preset: str
    num_seeds: int
    num_workers: int | None = None
    reporter: Reporter

    @property
    def seeds(self) -> range:
        """Seeds of the repetitions."""
        return range(self.num_seeds)

    def job(self, config: RunConfig, evaluations: tuple[Evaluation, ...], label: str) -> RunJob:
        """The job of a run; its seed is added to the seeds of its evaluations."""
        seed = config.train.seed
        return RunJob(
            config=config,
            evaluations=tuple(
                dataclasses.replace(evaluation, seed=evaluation.seed + seed) for evaluation in evaluations
            ),
            mixers=tuple((name, mixer_class(name)) for name in config.model.mixer_types),
            root=self.out / "runs",
            label=f"{label}, seed {seed}, rate {Trial.of(config).label}",
        )

    def do(self, jobs: Sequence[Job], label: str) -> None:
        """Do those jobs that are not done yet."""
        finished = [job for job in jobs if job.is_done()]
        open_jobs = [job for job in jobs if job not in finished]
        if finished:
            self.reporter.say(
                f"{label}: {len(finished)} of {len(jobs)} were finished before{_by_other_code(finished)}"
            )
        if open_jobs:
            run_jobs(do_job, open_jobs, reporter=self.reporter, num_workers=self.num_workers, label=label)


def _by_other_code(finished: Sequence[Job]) -> str:
    """How many jobs other versions of the code have done, and what to delete to do them again."""
    code = code_of(environment("cpu"))
    others = [{*map(code_of, job.environments())} - {code} for job in finished]
    if not any(others):
        return ""
    patterns = {str(job.pattern) for job, other in zip(finished, others, strict=True) if other}
    return (
        f", {sum(map(bool, others))} of them by {', '.join(sorted(set().union(*others)))}; this is {code}: "
        f"to make them anew, delete {' '.join(sorted(patterns))}"
    )


def reproduce(figure: Figure, shop: Workshop, *, lines: Sequence[str] = ()) -> dict[str, Any]:
    """Make a figure: `rows/NAME.json`, whose content it returns, and `figures/NAME.png`.

    Args:
        lines: Patterns for the labels of lines to make, with `*` for any text. The rows of other lines,
            and trials that were chosen before, are taken from `rows/NAME.json`, if it exists. Empty to make
            all lines.

    Raises:
        ValueError: If a run cannot be trained as it is configured, the folder has results of another preset,
            or `lines` match none of the figure.
    """
    _check_preset(shop)
    path = shop.out / "rows" / f"{figure.name}.json"
    part = chosen_lines(figure, lines)
    earlier = earlier_results(path, figure, shop.seeds) if lines else None
    sweep, chosen = _sweep(figure, part, shop, known=earlier["sweep"] if earlier else ())
    rows, environments = map(operator.add, _trained(part, chosen, shop), _measured(part, shop))
    only = "".join(f" --lines {shlex.quote(pattern)}" for pattern in lines)
    results = {
        "figure": figure.name,
        "title": figure.title,
        "note": figure.note,
        "preset": shop.preset,
        "command": f"ovq reproduce {figure.arguments or figure.name} --preset {shop.preset} "
        f"--seeds {shop.num_seeds}{only}",
        "seeds": list(shop.seeds),
        "panels": [dataclasses.asdict(panel) for panel in figure.panels],
        "sweep": sweep,
        "rows": rows,
        # Without duplicates.
        "environments": [each for i, each in enumerate(environments) if each not in environments[:i]],
    }
    if lines:
        results = joined_results(figure, part, earlier, results)
    for name in ("rows", "figures"):
        (shop.out / name).mkdir(parents=True, exist_ok=True)
    save_results(path, results)
    figure.draw(results, shop.out / "figures" / f"{figure.name}.png")
    return results


_Found = tuple[list[dict[str, Any]], list[dict[str, Any]]]


def _measured(figure: Figure, shop: Workshop) -> _Found:
    """Rows that a figure measures without training; missing seeds are measured now."""
    if figure.measure is None:
        return [], []
    jobs = [
        MeasureJob(
            figure=figure.name,
            measure=figure.measure,
            seed=seed,
            # The folder name of earlier versions, whose files are still used.
            root=shop.out / "studies",
            label=f"{figure.name}: seed {seed}",
        )
        for seed in shop.seeds
    ]
    shop.do(jobs, f"{figure.name}: seeds")
    rows = [row for job in jobs for row in job.record()["rows"]]
    return rows, [each for job in jobs for each in job.environments()]


def _trained(figure: Figure, chosen: dict[str, Trial], shop: Workshop) -> _Found:
    """Rows of the lines of a figure; missing runs and evaluations are done now."""
    # One job per run, with the evaluations of all lines that share it.
    jobs: dict[str, RunJob] = {}
    by_line: list[tuple[Line, RunJob]] = []
    for line in figure.lines:
        for seed in shop.seeds:
            config = with_seed(with_trial(line.config, chosen[run_name(line.swept)]), seed)
            job = shop.job(config, line.evaluations, f"{figure.name}: {line.label}")
            by_line.append((line, job))
            known = jobs.get(run_name(config))
            evaluations = dict.fromkeys((*(known.evaluations if known else ()), *job.evaluations))
            jobs[run_name(config)] = dataclasses.replace(known or job, evaluations=tuple(evaluations))
    _check_data(jobs.values())
    shop.do(list(jobs.values()), f"{figure.name}: runs")
    rows = [row for line, job in by_line for row in _rows(line, job)]
    return rows, [each for job in jobs.values() for each in job.environments()]


def _finished(record: dict[str, Any] | None) -> dict[str, Any]:
    assert record is not None
    return record


def _check_data(jobs: Iterable[RunJob]) -> None:
    """Check that there is enough text for the missing evaluations, before hours of training."""
    missing = {
        dataclasses.replace(evaluation, seed=0, num_slots=None)
        for job in jobs
        for evaluation in job.missing()
    }
    for evaluation in missing:
        evaluation.check()


def _check_preset(shop: Workshop) -> None:
    """Check that the folder has results of this preset only: the page of all results would mix them."""
    for path in (shop.out / "rows").glob("*.json"):
        if (found := load_results(path).get("preset")) != shop.preset:
            raise ValueError(
                f"--out: expected a folder of results of preset {shop.preset}, found {path} of {found}"
            )


def _sweep(
    figure: Figure, part: Figure, shop: Workshop, *, known: Sequence[dict[str, Any]] = ()
) -> tuple[list[dict[str, Any]], dict[str, Trial]]:
    """Train each model of a part of a figure with each trial on the first seed, except models in `known`.

    Returns:
        The outcomes, for the record, and the chosen trial by the name of the configured run.
    """
    # A run that several lines share is named after the first.
    swept = {run_name(line.swept): line for line in reversed(figure.lines)}
    needed = {run_name(line.swept) for line in part.lines}
    swept = {name: line for name, line in reversed(swept.items()) if name in needed}
    if not figure.trials:
        return [], {name: Trial.of(line.swept) for name, line in swept.items()}
    known_labels = {entry["line"]: entry["chosen"] for entry in known}
    decided = {
        name: trial
        for name, line in swept.items()
        for trial in figure.trials_of(line)
        if trial.label == known_labels.get(line.label)
    }
    swept = {name: line for name, line in swept.items() if name not in decided}
    first_seed = shop.seeds[0]
    tried: dict[str, dict[Trial, RunJob]] = {}
    for name, line in swept.items():
        assert line.validation is not None, "a figure with trials has validations"
        evaluation = dataclasses.replace(line.validation, seed=_VALIDATION_SEEDS)
        tried[name] = {
            trial: shop.job(
                with_seed(with_trial(line.swept, trial), first_seed),
                (evaluation,),
                f"{figure.name}: {line.label}",
            )
            for trial in figure.trials_of(line)
        }
    shop.do([job for jobs in tried.values() for job in jobs.values()], f"{figure.name}: trials")
    sweep, chosen = [], decided
    for name, line in swept.items():
        assert line.validation is not None
        judged_by = line.validation.judged_by
        is_loss = judged_by == "loss"
        found = {trial: _finished(*job.outcomes())[judged_by] for trial, job in tried[name].items()}
        chosen[name] = choose_trial(
            {trial: -value if is_loss else value for trial, value in found.items()}, Trial.of(line.swept)
        )
        sweep.append(
            {
                "line": line.label,
                "mixer": line.config.mixer,
                "seed": first_seed,
                "length": line.validation.num_tokens,
                "num_slots": line.validation.num_slots,
                "losses" if is_loss else "accuracies": {trial.label: value for trial, value in found.items()},
                "chosen": chosen[name].label,
            }
        )
    return sweep, chosen


def choose_trial(accuracies: dict[Trial, float], usual: Trial) -> Trial:
    """The trial with the highest accuracy (ties: learning rate nearest to `usual` in logs). NaN, the loss of
    a run that diverged, ranks last.

    Example:
        >>> trials = [Trial(learning_rate=rate) for rate in (0.002, 0.004, 0.016)]
        >>> choose_trial(dict(zip(trials, (0.9, 1.0, 1.0))), usual=trials[0]).learning_rate
        0.004
    """

    def rank(trial: Trial) -> tuple[float, float]:
        accuracy = accuracies[trial]
        closeness = -abs(math.log(trial.learning_rate / usual.learning_rate))
        return (-math.inf if math.isnan(accuracy) else accuracy), closeness

    return max(accuracies, key=rank)


def _rows(line: Line, job: RunJob) -> list[dict[str, Any]]:
    record = job.training_record()
    rows = []
    for evaluation, outcome in zip(job.evaluations, job.outcomes(), strict=True):
        assert outcome is not None
        rows.append(
            {
                "line": line.label,
                "group": line.group,
                # Outcomes of earlier versions lack the merge rule, which was that of training.
                "merge": job.config.model.merge if job.config.mixer == "ovq" else None,
                "logn_length": None,
                **{key: value for key, value in outcome.items() if key not in ("evaluation", "environment")},
                **evaluation.row_fields(),
                "microseconds_per_token": 1e6 * outcome["seconds"] / evaluation.num_read,
                "seed": job.config.train.seed,
                "learning_rate": job.config.train.learning_rate,
                "weight_decay": job.config.train.weight_decay,
                "train_length": max(job.config.train.lengths),
                "train_seconds": record["seconds"],
                "num_parameters": record["num_parameters"],
                "run": job.folder.name,
            }
        )
    return rows
