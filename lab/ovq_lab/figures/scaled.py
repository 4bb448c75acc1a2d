"""The figures `logn-*`: the effect of log-n scaling beyond the training length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from ovq.ops.options import BEST_MERGE
from ovq_lab.eval.rows import LOGN
from ovq_lab.figures.evaluations import Evaluation
from ovq_lab.figures.plan import Figure, Line, Panel
from ovq_lab.figures.presets import TOKENS_PER_SLOT, Preset
from ovq_lab.figures.rivals import ACCURACY, FULL, NEEDLE_FACTORS, needle_evaluation
from ovq_lab.train.config import RunConfig


def _by_length(preset: Preset, task: str, title: str, quality: Panel = ACCURACY) -> Figure:
    """A synthetic task far beyond the training length."""
    trained, usual = preset.train_length(task), preset.config(task)
    slots = f"{usual.model.num_slots} slots"
    tasks = {length: preset.task(task).at_length(length) for length in preset.lengths(task)}
    trained_slots = [preset.evaluation(each) for each in tasks.values()]
    grown = [
        preset.evaluation(each, num_slots=preset.enlarged(task, length, BEST_MERGE), merge=BEST_MERGE)
        for length, each in tasks.items()
    ]
    few = [preset.evaluation(tasks[length], merge=BEST_MERGE) for length in preset.near_lengths(task)]
    return _figure(
        f"logn-{task}",
        title,
        trained,
        (
            *_twice(FULL, preset.config(task, "full_attention"), trained_slots, trained),
            *_twice(f"OVQ, a slot for {TOKENS_PER_SLOT[BEST_MERGE]} tokens", usual, grown, trained),
            # The gate learns which tokens to leave out, which matters with few slots.
            *_twice(f"OVQ, {slots}", usual, few, trained),
            *_twice(f"OVQ, merge gate, {slots}", preset.config(task, merge_gate=True), few, trained),
        ),
        quality,
    )


def _needles(preset: Preset) -> Figure:
    """Uuids hidden in essays: values of 36 characters, which are retrieved character by character."""
    trained, usual = preset.train_length("needles"), preset.config("needles")
    slots = f"{usual.model.num_slots} slots"
    lines: list[Line] = []
    for label, config, merge in (
        (FULL, preset.config("needles", "full_attention"), None),
        (f"OVQ, {slots}", usual, BEST_MERGE),
        (f"OVQ, merge gate, {slots}", preset.config("needles", merge_gate=True), BEST_MERGE),
    ):
        asked = dataclasses.replace(needle_evaluation(preset, "uuid", "essay"), merge=merge)
        evaluations = [dataclasses.replace(asked, length=trained * factor) for factor in NEEDLE_FACTORS]
        lines += _twice(label, config, evaluations, trained)
    panel = Panel(title="share of questions answered with the value", y="generated")
    title = f"uuids in essays ({preset.text_task('needles').dataset})"
    return _figure("logn-needles", title, trained, lines, panel)


def _figure(name: str, title: str, trained: int, lines: Sequence[Line], quality: Panel) -> Figure:
    return Figure(
        name=name,
        title=f"Logits that grow with the logarithm of the length: {title}",
        note="The same weights twice: as they were trained, and with logits times log t / log T for the t-th "
        f"token of a text, where that is above 1; T is the training length, {trained} tokens. OVQ is "
        "evaluated by nearest.",
        lines=tuple(lines),
        panels=(quality,),
    )


def _twice(label: str, config: RunConfig, evaluations: Sequence[Evaluation], trained: int) -> list[Line]:
    """Lines of a model without and with scaled logits."""
    scaled = [dataclasses.replace(each, logn_length=trained) for each in evaluations]
    return [
        Line(label=label, config=config, evaluations=tuple(evaluations)),
        Line(label=f"{label}, {LOGN}", config=config, evaluations=tuple(scaled)),
    ]


FIGURES: dict[str, Callable[[Preset], Figure]] = {
    "logn-recall": partial(_by_length, task="recall", title="basic recall"),
    "logn-positional": partial(_by_length, task="positional", title="positional recall"),
    "logn-mqar": partial(_by_length, task="mqar", title="multi-query associative recall"),
    "logn-regression": partial(
        _by_length,
        task="regression",
        title="linear regression in context",
        quality=Panel(title="mean absolute error of y", y="mean_error"),
    ),
    "logn-needles": _needles,
}
