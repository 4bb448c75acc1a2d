"""Named training runs. Any field of them can be changed on the command line with `--set`."""

from __future__ import annotations

from collections.abc import Callable

from ovq.tasks import MQARTask, PositionalRecallTask, RecallTask, RegressionTask
from ovq.train.config import ModelArgs, RunConfig, TrainArgs


def _recall(long_range_mixer: str) -> RunConfig:
    """In-context recall: one layer finds the value, at any distance."""
    return RunConfig(
        task=RecallTask(vocab_size=66, key_length=2, value_length=1, pair_share=0.2),
        # A window far shorter than the examples leaves nearly all questions to the other layer. Heads as wide
        # as the model keep the keys of many pairs apart, which counts at lengths beyond those of training.
        model=ModelArgs(mixer_types=("sliding_attention", long_range_mixer), head_dim=64, sliding_window=16),
        train=TrainArgs(),
    )


def _positional(long_range_mixer: str) -> RunConfig:
    """Positional recall: one long-range layer numbers the occurrences of a key, a second finds the value."""
    return RunConfig(
        # Enough keys for examples of 64k tokens, which hold 1,092 of them.
        task=PositionalRecallTask(vocab_size=130, key_length=2, pair_share=0.2),
        model=ModelArgs(
            mixer_types=("sliding_attention", long_range_mixer) * 2, head_dim=64, sliding_window=16
        ),
        # 4 keys at the end: with those of half the length, numbering them holds less far beyond.
        train=TrainArgs(steps=1200, lengths=(64, 128, 256), length_shares=(0.3, 0.2, 0.5)),
    )


def _regression(long_range_mixer: str) -> RunConfig:
    """Linear regression: the long-range layer gathers what the points of a function say about it."""
    return RunConfig(
        task=RegressionTask(vocab_size=1 + 7 + 21 + 128),
        model=ModelArgs(
            mixer_types=("sliding_attention", long_range_mixer),
            intermediate_size=256,
            head_dim=64,
            sliding_window=16,
        ),
        train=TrainArgs(steps=2000, lengths=(48, 96, 192), length_shares=(0.4, 0.2, 0.4)),
    )


def _mqar(long_range_mixer: str) -> RunConfig:
    """Zoology's multi-query associative recall, with chunks so short that OVQ does not read it exactly."""
    return RunConfig(
        task=MQARTask(),
        model=ModelArgs(
            mixer_types=("sliding_attention", long_range_mixer), head_dim=64, sliding_window=16, chunk_size=16
        ),
        train=TrainArgs(steps=600, lengths=(64, 128), length_shares=(0.5, 0.5)),
    )


_BUILDERS: dict[str, Callable[[str], RunConfig]] = {
    RecallTask.name: _recall,
    PositionalRecallTask.name: _positional,
    RegressionTask.name: _regression,
    MQARTask.name: _mqar,
}

_MIXERS = {
    "ovq": "ovq",
    "full": "full_attention",
    "sliding": "sliding_attention",
    "sinks": "sink_attention",
    "vq": "vq",
    "linear": "linear_attention",
    "gdn": "gated_deltanet",
    "mamba2": "mamba2",
}
"""How names of recipes call the long-range mixers."""


def recipe_for(task: str, long_range_mixer: str) -> RunConfig:
    """The recipe of a task, for any mixer in its long-range layers; nothing else differs between mixers.

    Args:
        task: A name in `ovq.tasks.TASKS`.
        long_range_mixer: A name in `ovq.layers.MIXERS`.

    Raises:
        ValueError: If there is no recipe for the task. The mixer is checked when the model is built.

    Example:
        >>> recipe_for("recall", "sliding_attention").model.mixer_types
        ('sliding_attention', 'sliding_attention')
    """
    if task not in _BUILDERS:
        raise ValueError(f"task: expected one of {', '.join(_BUILDERS)}, found {task!r}")
    return _BUILDERS[task](long_range_mixer)


RECIPES: dict[str, RunConfig] = {
    f"{task}-{short}": recipe_for(task, mixer) for task in _BUILDERS for short, mixer in _MIXERS.items()
}
"""Every recipe by its name on the command line."""


def get_recipe(name: str) -> RunConfig:
    """The recipe of this name.

    Raises:
        ValueError: If there is none; lists those there are.

    Example:
        >>> get_recipe("recall-ovq").model.mixer_types
        ('sliding_attention', 'ovq')
    """
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, found {name!r}")
    return RECIPES[name]
