"""Declarations of figures: training runs, evaluations of each, and panels that show the results.

Nothing here computes. A run is identified by a digest of everything that its outcome depends on, so figures
that need the same run share it, and a figure that is made again reuses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovq_lab.figures.digests import WITHOUT_EFFECT, described, digest
from ovq_lab.figures.evaluations import Evaluation
from ovq_lab.plots.draw import Panel, save_figure
from ovq_lab.train.config import RunConfig

Variant = tuple[tuple[str, Any], ...]
"""Model fields and their values: one of several configurations of a mixer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """Hyperparameters of a trial: of the optimizer, and optionally of the mixer."""

    learning_rate: float
    weight_decay: float = 0.0
    variant: Variant = ()

    @classmethod
    def of(cls, config: RunConfig) -> Trial:
        """The optimizer hyperparameters of a run."""
        return cls(learning_rate=config.train.learning_rate, weight_decay=config.train.weight_decay)

    @property
    def label(self) -> str:
        """Its name in tables."""
        decay = f", decay {self.weight_decay:g}" if self.weight_decay else ""
        return f"{self.learning_rate:g}{decay}" + "".join(f", {name} {value}" for name, value in self.variant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a figure: a model, trained once for each seed, and its evaluations.

    Attributes:
        config: The run; the seed is set for each repetition, and the trial's hyperparameters if there are
            trials.
        group: Panels of this group show it.
        trial_of: The run whose best trial this line uses; by default its own.
        validation: The evaluation that chooses the trial; no row uses its examples.
        variants: Configurations of its mixer, each of which is combined with each trial.

    Lines of the same label are drawn as one, so that points of a line can come from different models.
    """

    label: str
    config: RunConfig
    evaluations: tuple[Evaluation, ...]
    group: str = ""
    trial_of: RunConfig | None = None
    validation: Evaluation | None = None
    variants: tuple[Variant, ...] = ((),)

    @property
    def swept(self) -> RunConfig:
        """The run whose trials choose the hyperparameters."""
        return self.trial_of or self.config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure: models that are trained and evaluated, or a measurement without training.

    Attributes:
        trials: Hyperparameters that each model is trained with on the first seed; the best is used for all
            seeds. Empty to use those of the configuration.
        measure: Returns the rows of a seed without training, each with its `line`, `group` and `seed`. It is
            pickled for worker processes, so it must be a module-level function.
        arguments: Arguments of `ovq reproduce` that make it; by default its name.
    """

    name: str
    title: str
    panels: tuple[Panel, ...]
    lines: tuple[Line, ...] = ()
    trials: tuple[Trial, ...] = ()
    measure: Callable[[int], list[dict[str, Any]]] | None = None
    note: str = ""
    arguments: str = ""
    draw: Callable[[dict[str, Any], Path], None] = save_figure

    def __post_init__(self) -> None:
        """Assert that the declaration is consistent; if not, it is a bug in this package."""
        assert self.lines or self.measure, "a figure needs rows"
        assert all(bool(self.trials) == (line.validation is not None) for line in self.lines), (
            "a sweep needs validations"
        )
        assert self.measure or {line.group for line in self.lines} == {panel.group for panel in self.panels}

    def trials_of(self, line: Line) -> tuple[Trial, ...]:
        """All trials of a line: each of the figure's trials with each variant of the line."""
        return tuple(
            dataclasses.replace(trial, variant=variant) for trial in self.trials for variant in line.variants
        )


def position_panels(relative_to: str, *, groups: tuple[str, str] = ("", "")) -> tuple[Panel, Panel]:
    """The loss by position, and its difference in per cent to the line of this label."""
    by_position: dict[str, Any] = {"x": "positions", "y": "position_losses"}
    return (
        Panel(title="loss", group=groups[0], **by_position),
        Panel(title=f"per cent above {relative_to}", group=groups[1], relative_to=relative_to, **by_position),
    )


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same run with another seed of weights and data."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def with_trial(config: RunConfig, trial: Trial) -> RunConfig:
    """The same run with the hyperparameters of a trial."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **dict(trial.variant)),
        train=dataclasses.replace(
            config.train, learning_rate=trial.learning_rate, weight_decay=trial.weight_decay
        ),
    )


def run_name(config: RunConfig) -> str:
    """The folder name of a run: readable, and different for different runs.

    It depends only on fields that are not at their defaults, so that a new field whose default changes
    nothing does not change the names of existing runs.
    """
    sections = {name: described(getattr(config, name)) for name in ("task", "model", "train")}
    return f"{config.task.name}-{config.mixer}-seed{config.train.seed}-{digest(sections)}"


def is_same_run(config: RunConfig, other: RunConfig) -> bool:
    """Whether two configurations agree in all fields that affect the outcome."""
    fields = {name: getattr(other.train, name) for name in WITHOUT_EFFECT}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields)) == other


def count_runs(figure: Figure, num_seeds: int) -> int:
    """Largest number of models that a figure trains if none is finished yet."""
    num_models = len({run_name(line.config) for line in figure.lines})
    num_trials = {run_name(line.swept): len(figure.trials_of(line)) for line in figure.lines}
    # The first seed of the chosen trial is trained anyway.
    return num_models * num_seeds + sum(max(0, num - 1) for num in num_trials.values())
