"""Ablation figures of OVQ on basic recall."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ovq.ops.options import BEST_MERGE
from ovq_lab.eval.rows import MERGE_NAMES
from ovq_lab.figures.plan import Figure, Line, Panel
from ovq_lab.figures.presets import Preset
from ovq_lab.mixers.names import MIXER_NAMES


def _ablation(
    preset: Preset,
    name: str,
    title: str,
    variants: dict[str, dict[str, Any]],
    note: str = "",
    rules: Mapping[str, str] | None = None,
) -> Figure:
    """OVQ on basic recall with fields of the model changed, evaluated with two sizes of the dictionary.

    `variants` maps labels to changed fields, of which `mixer` is the long-range mixer; `rules` maps labels to
    the merge rule of the evaluation, if it differs from that of training.
    """
    usual = preset.config("recall")
    tasks = [preset.task("recall").at_length(length) for length in preset.near_lengths("recall")]
    trained = usual.model.num_slots
    enlarged = trained * max(preset.length_factors)
    lines = []
    for label, fields in variants.items():
        config = preset.config("recall", **fields)
        has_slots = config.mixer == "ovq"
        for group, num_slots in (("trained", None), ("enlarged", enlarged)):
            evaluations = [
                preset.evaluation(
                    task, num_slots=num_slots if has_slots else None, merge=(rules or {}).get(label)
                )
                for task in tasks
            ]
            lines.append(Line(label=label, config=config, evaluations=tuple(evaluations), group=group))
    return Figure(
        name=name,
        title=title,
        note=note,
        lines=tuple(lines),
        panels=(
            Panel(title=f"{trained} slots, as in training", group="trained"),
            Panel(title=f"{enlarged} slots at test time", group="enlarged"),
        ),
    )


def _rate(preset: Preset) -> Figure:
    """Constant step sizes of a slot towards a merged key, against 1/count."""
    constant = {f"{value:g}": {"rate": value} for value in preset.rates}
    return _ablation(
        preset,
        "rate",
        "How far a slot moves to a key merged into it",
        {"1/count (OVQ)": {}, **constant},
        note="With a constant rate old content fades; with 1/count a slot is the mean of all it was given.",
    )


def _merge(preset: Preset) -> Figure:
    """The merge rule: keys into slots from before their chunk, into slots of any age, or nearest pairs."""
    asked = {f"trained by the first, evaluated by {MERGE_NAMES[BEST_MERGE]}": BEST_MERGE}
    return _ablation(
        preset,
        "merge",
        "What is merged",
        {
            "keys into slots from before their chunk (OVQ)": {},
            "keys into those their chunk opened, too": {"merge": "updated"},
            "what is nearest to each other (nearest)": {"merge": BEST_MERGE},
            **{label: {} for label in asked},
        },
        note="Where pairs are merged, slots are merged with each other, too. Growth is immediate then: until "
        "the dictionary is full, it holds more slots.",
        rules=asked,
    )


def _chunk(preset: Preset) -> Figure:
    """The size of a chunk."""
    usual = preset.configs["recall"].model.chunk_size
    return _ablation(
        preset,
        "chunk",
        "Tokens a chunk, read exactly before they are merged",
        {
            f"{size} tokens" + (" (usual)" if size == usual else ""): {"chunk_size": size}
            for size in preset.chunk_sizes
        },
    )


def _conv(preset: Preset) -> Figure:
    """The short convolution, for OVQ and for full attention."""
    size = preset.configs["recall"].model.conv_size
    return _ablation(
        preset,
        "conv",
        "The short convolution on queries, keys and values",
        {
            f"{MIXER_NAMES[mixer]}, {label}": {"mixer": mixer, "conv_size": conv_size}
            for mixer in ("full_attention", "ovq")
            for label, conv_size in ((f"{size} taps", size), ("none", 0))
        },
        note="With or without it in all layers, those of the window included.",
    )


FIGURES: dict[str, Callable[[Preset], Figure]] = {
    "init": partial(
        _ablation,
        name="init",
        title="Which keys open new slots",
        variants={"novelty (OVQ)": {}, "at random": {"init": "random"}},
    ),
    "growth": partial(
        _ablation,
        name="growth",
        title="How the dictionary grows with the tokens seen",
        variants={"plateau (OVQ)": {}, "linear": {"growth": "linear"}, "immediate": {"growth": "immediate"}},
        note="Growth that is faster holds more slots at the same length, and more bytes.",
    ),
    "rate": _rate,
    "merge": _merge,
    "bias": partial(
        _ablation,
        name="bias",
        title="What is added to the score of a slot",
        variants={"log count (OVQ)": {}, "log count and norm term": {"bias": "count+norm"}},
    ),
    "chunk": _chunk,
    "conv": _conv,
}
