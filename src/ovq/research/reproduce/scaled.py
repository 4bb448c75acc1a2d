"""The figures `logn` and `logn-needles`: what log-n scaling changes beyond the training length."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ovq.eval.rows import MIXER_NAMES
from ovq.ops.options import BEST_MERGE
from ovq.research.reproduce.evaluations import Evaluation
from ovq.research.reproduce.plan import Figure, Line, Panel
from ovq.research.reproduce.presets import TOKENS_PER_SLOT, Preset
from ovq.research.reproduce.rivals import NEEDLE_FACTORS, needle_evaluation
from ovq.train.config import RunConfig

_TASKS = {
    "recall": ("basic recall", "accuracy"),
    "positional": ("positional recall", "accuracy"),
    "mqar": ("multi-query associative recall", "accuracy"),
    "regression": ("linear regression in context: the mean absolute error", "mean_error"),
}
"""What each task is called, and by which field it is judged."""

_NOTE = (
    "The same weights twice: as they were trained, and with logits times log t / log T for the t-th token "
    "of a text, where that is above 1 and T is the training length ({length}). OVQ is asked by Ward-sqrt."
)


def logn(preset: Preset) -> Figure:
    """All synthetic tasks, far beyond the training length."""
    lines: list[Line] = []
    for task, (title, _) in _TASKS.items():
        trained, usual = preset.train_length(task), preset.config(task)
        slots = f"{usual.model.num_slots} slots"
        share = f"a slot for {TOKENS_PER_SLOT[BEST_MERGE]} tokens"
        exact, gated = preset.config(task, "full_attention"), preset.config(task, merge_gate=True)

        tasks = {length: preset.task(task).at_length(length) for length in preset.lengths(task)}
        asked = [preset.evaluation(each) for each in tasks.values()]
        lines += _twice(MIXER_NAMES["full_attention"], exact, asked, trained, title)
        grown = [
            preset.evaluation(each, num_slots=preset.enlarged(task, length, BEST_MERGE), merge=BEST_MERGE)
            for length, each in tasks.items()
        ]
        few = [preset.evaluation(tasks[length], merge=BEST_MERGE) for length in preset.near_lengths(task)]
        lines += _twice(f"OVQ, {share}", usual, grown, trained, title)
        # The gate learns what to leave out, which matters where slots are few.
        lines += _twice(f"OVQ, {slots}", usual, few, trained, title)
        lines += _twice(f"OVQ, merge gate, {slots}", gated, few, trained, title)
    return Figure(
        name="logn",
        title="Logits that grow with the logarithm of the length, beyond the training length",
        note=_NOTE.format(length="that of each task"),
        lines=tuple(lines),
        panels=tuple(Panel(title=title, y=y, group=title) for title, y in _TASKS.values()),
    )


def logn_needles(preset: Preset) -> Figure:
    """Uuids hidden in essays: values of 36 characters, which are found one by one."""
    trained, usual = preset.train_length("needles"), preset.config("needles")
    lines: list[Line] = []
    for label, config, merge in (
        (MIXER_NAMES["full_attention"], preset.config("needles", "full_attention"), None),
        (f"OVQ, {usual.model.num_slots} slots", usual, BEST_MERGE),
        (
            f"OVQ, merge gate, {usual.model.num_slots} slots",
            preset.config("needles", merge_gate=True),
            BEST_MERGE,
        ),
    ):
        asked = dataclasses.replace(needle_evaluation(preset, "uuid", "essay"), merge=merge)
        evaluations = [dataclasses.replace(asked, length=trained * factor) for factor in NEEDLE_FACTORS]
        lines += _twice(label, config, evaluations, trained, "")
    return Figure(
        name="logn-needles",
        title="Logits that grow with the logarithm of the length: uuids in essays",
        note=_NOTE.format(length=f"{trained} tokens"),
        lines=tuple(lines),
        panels=(Panel(title="share of questions answered with the value", y="generated"),),
    )


def _twice(
    label: str, config: RunConfig, evaluations: Sequence[Evaluation], trained: int, group: str
) -> list[Line]:
    """A model as it was trained and with scaled logits."""
    scaled = [dataclasses.replace(each, logn_length=trained) for each in evaluations]
    return [
        Line(label=label, config=config, evaluations=tuple(evaluations), group=group),
        Line(label=f"{label}, log-n", config=config, evaluations=tuple(scaled), group=group),
    ]
