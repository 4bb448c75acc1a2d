"""Named training runs. Any field of them can be changed on the command line with `--set`."""

from __future__ import annotations

from ovq.tasks import RecallTask
from ovq.train.config import ModelArgs, RunConfig, TrainArgs


def _recall(long_range_mixer: str) -> RunConfig:
    """In-context recall with a window and one long-range mixer, which is all that differs."""
    return RunConfig(
        task=RecallTask(vocab_size=66, key_length=2, value_length=1, pair_share=0.2),
        # A window far shorter than the examples leaves nearly all questions to the other layer. Heads as wide
        # as the model keep the keys of many pairs apart, which counts at lengths beyond those of training.
        model=ModelArgs(mixer_types=("sliding_attention", long_range_mixer), head_dim=64, sliding_window=16),
        train=TrainArgs(),
    )


RECIPES: dict[str, RunConfig] = {
    "recall-ovq": _recall("ovq"),
    "recall-full": _recall("full_attention"),
    "recall-sliding": _recall("sliding_attention"),
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
