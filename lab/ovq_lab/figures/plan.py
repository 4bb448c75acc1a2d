"""What a figure consists of: training runs, evaluations of each, and panels that show what came out.

Nothing here computes. A run is known by a digest of what its outcome depends on, so that two figures that
need the same run share it, and so does the same figure when it is made again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovq_lab.figures.digests import WITHOUT_EFFECT, described, digest
from ovq_lab.figures.draw import save_figure
from ovq_lab.figures.evaluations import Evaluation
from ovq_lab.train.config import RunConfig

Variant = tuple[tuple[str, Any], ...]
"""Fields of the model and their values, of one of several ways to set a mixer up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """Settings that a model is tried with: of the optimizer, and of its mixer where there are several ways.

    Attributes:
        learning_rate: The peak.
        weight_decay: As in `TrainArgs`.
        variant: Fields of the model and their values.

    Example:
        >>> Trial(learning_rate=0.004).label, Trial(learning_rate=0.008, weight_decay=0.5).label
        ('0.004', '0.008, decay 0.5')
        >>> Trial(learning_rate=0.004, variant=(("kvm_growth", "plateau"),)).label
        '0.004, kvm_growth plateau'
    """

    learning_rate: float
    weight_decay: float = 0.0
    variant: Variant = ()

    @classmethod
    def of(cls, config: RunConfig) -> Trial:
        """The settings of the optimizer of a run."""
        return cls(learning_rate=config.train.learning_rate, weight_decay=config.train.weight_decay)

    @property
    def label(self) -> str:
        """What tables call it."""
        decay = f", decay {self.weight_decay:g}" if self.weight_decay else ""
        return f"{self.learning_rate:g}{decay}" + "".join(f", {name} {value}" for name, value in self.variant)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a figure: a model, trained once for each seed, and its evaluations.

    Attributes:
        label: Its name in the legend.
        config: The run; the seed is set for each repetition, and what a trial says where there are several.
        evaluations: What each trained model is evaluated on.
        group: Which panels show it: those of the same group.
        trial_of: Where models are tried with several settings, the run whose best this one takes; its own if
            not given.
        validation: What decides between those settings; its examples are those of no row.
        variants: Ways to set its mixer up that are tried with each of those settings.

    Lines of one label are drawn as one: that is how the points of a line come from different models.
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
        """The run that decides on the settings of the optimizer."""
        return self.trial_of or self.config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes: a field of the rows against another, for the lines of a group.

    Attributes:
        title: What stands above.
        x: A field of the rows, or a number of their task as `"task.NAME"`; `"slices"` for the parts that the
            task divides its questions into, `"positions"` for the parts of a text.
        y: A field of the rows; beside `x="slices"` one that has a value for each part: `"slices"` for the
            accuracy, `"slice_errors"` for the error; beside `x="positions"` it is `"position_losses"`.
        group: The lines to show.
        at_length: Show rows of this length alone; `None` for all.
        relative_to: Show by how many per cent values are above those of the line of this label, seed by
            seed; `None` for the values themselves.
    """

    title: str
    x: str = "length"
    y: str = "accuracy"
    group: str = ""
    at_length: int | None = None
    relative_to: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure: models that are trained and evaluated, or a measurement without training.

    Attributes:
        name: What the command line calls it.
        title: What it shows, in a line.
        panels: What is drawn, one below the other; the page has a table for each.
        lines: The models of all panels.
        trials: Settings that each model is tried with on the first seed, to go on with the best; none to
            train with those of the configuration.
        measure: Returns the rows of a seed without training, each with its `line`, `group` and `seed`. Worker
            processes call it, so it has to be the function of a module.
        note: What a reader has to know beside the title.
        arguments: The arguments with which `ovq reproduce` makes it; its name if not given.
        draw: Draws what the JSON file of the figure holds into a PNG file.
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
        """A figure that cannot come out as it is meant is a mistake in this package."""
        assert self.lines or self.measure, "a figure needs rows"
        assert all(bool(self.trials) == (line.validation is not None) for line in self.lines), (
            "a sweep needs validations"
        )
        assert self.measure or {line.group for line in self.lines} == {panel.group for panel in self.panels}

    def trials_of(self, line: Line) -> tuple[Trial, ...]:
        """What the model of a line is tried with."""
        return tuple(
            dataclasses.replace(trial, variant=variant) for trial in self.trials for variant in line.variants
        )


def with_seed(config: RunConfig, seed: int) -> RunConfig:
    """The same run with another seed of weights and data."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))


def with_trial(config: RunConfig, trial: Trial) -> RunConfig:
    """The same run with other settings."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **dict(trial.variant)),
        train=dataclasses.replace(
            config.train, learning_rate=trial.learning_rate, weight_decay=trial.weight_decay
        ),
    )


def run_name(config: RunConfig) -> str:
    """The folder name of a run: readable, and different for different runs.

    It depends on the fields that are not at their defaults, so that a field added later, with a default that
    changes nothing, leaves the runs of today what they are.

    Example:
        >>> from ovq_lab.train.recipes import get_recipe
        >>> config = get_recipe("recall-ovq")
        >>> run_name(config)
        'recall-ovq-seed0-...'
        >>> run_name(config.override(["train.log_every=5"])) == run_name(config)
        True
        >>> run_name(config.override(["model.num_slots=65"])) == run_name(config)
        False
    """
    sections = {name: described(getattr(config, name)) for name in ("task", "model", "train")}
    return f"{config.task.name}-{config.mixer}-seed{config.train.seed}-{digest(sections)}"


def is_same_run(config: RunConfig, other: RunConfig) -> bool:
    """Whether two configurations are of one run, every field that has an effect compared."""
    fields = {name: getattr(other.train, name) for name in WITHOUT_EFFECT}
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **fields)) == other
