"""All figures, each built for the sizes of a preset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ovq.fields import did_you_mean
from ovq.layers.registry import mixer_class
from ovq.ops.options import BEST_MERGE
from ovq_lab.eval.rows import model_label
from ovq_lab.figures import ablations, rivals, scaled
from ovq_lab.figures.evaluations import Evaluation, KeptEvaluation, TaskEvaluation
from ovq_lab.figures.fidelity.measure import fidelity_rows
from ovq_lab.figures.fidelity.streams import STREAMS
from ovq_lab.figures.narrow import narrow
from ovq_lab.figures.plan import Figure, Line, Panel
from ovq_lab.figures.presets import TOKENS_PER_SLOT, Preset
from ovq_lab.figures.text_figures import hybrids, language, longer, needle, of_corpus
from ovq_lab.mixers.names import MIXER_NAMES
from ovq_lab.tasks import PositionalRecallTask, RegressionTask, Task
from ovq_lab.train.config import RunConfig

# In the order of legends and tables.
_COMPARED = (
    "full_attention",
    "ovq",
    "vq",
    "linear_attention",
    "gated_deltanet",
    "mamba2",
    "sink_attention",
    "sliding_attention",
)

# OVQ with the merge rule of training, and with our best rule on the same weights.
_RULES = (("OVQ", None), ("OVQ, nearest", BEST_MERGE))


def _validation(preset: Preset, task: str, mixer: str) -> Evaluation:
    """The evaluation that chooses between trials of a mixer; for OVQ with the enlarged dictionary."""
    length = rivals.VALIDATION_FACTOR * preset.train_length(task)
    num_slots = preset.enlarged(task, length) if mixer == "ovq" else None
    return preset.evaluation(preset.task(task).at_length(length), num_slots=num_slots)


def _mixers_by_length(
    preset: Preset,
    task: str,
    *,
    title: str,
    note: str,
    quality: tuple[Panel, ...] = (rivals.ACCURACY,),
) -> Figure:
    """All mixers on one task against length: quality, bytes of state, time."""
    tasks = [preset.task(task).at_length(length) for length in preset.lengths(task)]
    lines = []
    for mixer in _COMPARED:
        evaluations = {MIXER_NAMES[mixer]: [preset.evaluation(each) for each in tasks]}
        if mixer == "ovq":
            evaluations = _by_both_rules(preset, task, tasks)
        lines += [
            Line(
                label=label,
                config=preset.config(task, mixer),
                evaluations=tuple(each),
                validation=_validation(preset, task, mixer),
            )
            for label, each in evaluations.items()
        ]
    return Figure(
        name=task,
        title=title,
        note=note,
        lines=tuple(lines),
        panels=(*quality, Panel(title="memory", y="state_bytes")),
        trials=preset.trials,
    )


def _by_both_rules(preset: Preset, name: str, tasks: Sequence[Task]) -> dict[str, list[TaskEvaluation]]:
    """Evaluations of OVQ with the merge rule of training and with our best rule, each with the slots of
    training and with more."""
    trained = preset.configs[name].model.num_slots
    evaluations = {}
    for rule, merge in _RULES:
        evaluations[f"{rule}, {trained} slots"] = [preset.evaluation(each, merge=merge) for each in tasks]
    for rule, merge in _RULES:
        merge_rule = merge or "existing"
        evaluations[f"{rule}, a slot for {TOKENS_PER_SLOT[merge_rule]} tokens"] = [
            preset.evaluation(each, num_slots=preset.enlarged(name, each.length, merge_rule), merge=merge)
            for each in tasks
        ]
    return evaluations


def fidelity(preset: Preset) -> Figure:
    """The error of memories of equal bytes against exact attention, without training."""
    return Figure(
        name="fidelity",
        title="Memories of equal bytes against exact attention, without training",
        measure=fidelity_rows,
        panels=tuple(Panel(title=name, y="error", group=name) for name in STREAMS),
        note="The same at every preset.",
    )


def positional(preset: Preset) -> Figure:
    """Accuracy of all mixers on positional in-context recall."""
    task = preset.task("positional")
    assert isinstance(task, PositionalRecallTask)
    return _mixers_by_length(
        preset,
        "positional",
        title="Positional in-context recall beyond the training length",
        note=f"Each key is stored {task.num_occurrences} times with different values, which are asked for in "
        "order. The number of keys grows with the length.",
    )


def regression(preset: Preset) -> Figure:
    """Error of all mixers on linear regression in context, by number of functions and of points seen."""
    usual = preset.task("regression")
    assert isinstance(usual, RegressionTask)
    # The shortest length with the largest number of functions.
    length = next(
        each
        for each in preset.lengths("regression")
        if usual.at_length(each).num_functions == usual.max_functions
    )
    return _mixers_by_length(
        preset,
        "regression",
        title="Linear regression in context: the mean absolute error of y",
        note="Points of many functions y = a x + b in random order. With the length grows the number of "
        f"functions, up to {usual.max_functions}. The second panel divides the questions at {length} tokens "
        "by how many points of the same function came before.",
        quality=(
            Panel(title="error by functions", x="task.num_functions", y="mean_error"),
            Panel(
                title=f"error by points seen, {usual.max_functions} functions",
                x="slices",
                y="slice_errors",
                at_length=length,
            ),
        ),
    )


def state_size(preset: Preset) -> Figure:
    """Accuracy against bytes of state, at lengths beyond training."""
    train_length = preset.train_length("recall")
    lengths = [train_length * factor for factor in (4, 16)]
    tasks = [preset.task("recall").at_length(length) for length in lengths]
    trained = preset.configs["recall"].model.num_slots
    lines = []
    for group, task in zip(("near", "far"), tasks, strict=True):
        for mixer in _COMPARED:
            usual = preset.config("recall", mixer)
            sizes = [usual, *(preset.config("recall", mixer, **size) for size in preset.sizes.get(mixer, ()))]
            lines += [
                Line(
                    label=MIXER_NAMES[mixer],
                    config=config,
                    evaluations=(preset.evaluation(task),),
                    group=group,
                    trial_of=usual,
                    validation=_validation(preset, "recall", mixer),
                )
                for config in sizes
            ]
        lines += [
            Line(
                label=f"{rule}, trained with {trained} slots, more at test time",
                config=preset.config("recall"),
                evaluations=tuple(
                    preset.evaluation(task, num_slots=trained * factor, merge=merge)
                    for factor in preset.slot_factors
                ),
                group=group,
                validation=_validation(preset, "recall", "ovq"),
            )
            for rule, merge in _RULES
        ]
    return Figure(
        name="bytes",
        title="Basic recall against bytes of state",
        note="Each point of a line is a model trained with a state of that size, but where the legend says "
        "otherwise. Settings of the optimizer are those that the usual size of each mixer does best with. "
        "By nearest the same weights are asked, which were trained by the paper's rule.",
        lines=tuple(lines),
        panels=tuple(
            Panel(
                title=f"{length} tokens, {length // train_length} times the training length",
                x="state_bytes",
                group=group,
            )
            for group, length in zip(("near", "far"), lengths, strict=True)
        ),
        trials=preset.trials,
    )


def dictionary(preset: Preset) -> Figure:
    """The size of the dictionary varied at test time, on the same weights."""
    config = preset.config("recall")
    sizes = [config.model.num_slots * factor for factor in preset.slot_factors]
    lines = []
    for length in sorted({*preset.near_lengths("recall")[::2], *preset.far_lengths.get("recall", ())}):
        task = preset.task("recall").at_length(length)
        for rule, merge in (("", None), (", nearest", BEST_MERGE)):
            evaluations = [preset.evaluation(task, num_slots=num_slots, merge=merge) for num_slots in sizes]
            lines += [
                Line(
                    label=f"{length} tokens",
                    config=config,
                    evaluations=tuple(evaluations),
                    group=f"{group}{rule}",
                )
                for group in ("slots", "bytes")
            ]
    return Figure(
        name="dictionary",
        title=f"OVQ trained with {config.model.num_slots} slots: the dictionary at test time",
        note="All points of a seed come from the same weights.",
        lines=tuple(lines),
        panels=(
            Panel(title="slots, paper's rule", x="num_slots", group="slots"),
            Panel(title="slots, nearest", x="num_slots", group="slots, nearest"),
            Panel(title="bytes of state, paper's rule", x="state_bytes", group="bytes"),
            Panel(title="bytes of state, nearest", x="state_bytes", group="bytes, nearest"),
        ),
    )


def kept(preset: Preset) -> Figure:
    """Pairs with a slot of their own, and the fill and age of slots."""
    config = preset.config("recall")
    trained = config.model.num_slots
    lengths = [preset.train_length("recall") * factor for factor in (4, 16)]
    tasks, lines = [preset.task("recall").at_length(n) for n in lengths], []
    for merge in ("existing", BEST_MERGE):
        for num_slots in (trained, 4 * trained):
            evaluations = [
                preset.evaluation(task, num_slots=num_slots, merge=merge, kind=KeptEvaluation)
                for task in tasks
            ]
            label = model_label("ovq", num_slots, merge=merge)
            lines.append(Line(label=label, config=config, evaluations=tuple(evaluations)))
    longest = max(lengths)
    part = f"{longest} tokens: by sixteenth of the context"
    return Figure(
        name="kept",
        title=f"What is kept of basic recall, trained with {trained} slots by the paper's rule",
        note="A pair has a slot of its own if the token that is read of it shares its slot with no such "
        "token of another pair, in one of the heads, when it is asked for. Tokens per slot and ages are "
        "those when the questions begin.",
        lines=tuple(lines),
        panels=(
            Panel(title="questions whose pair has a slot of its own", y="own_share"),
            Panel(title="where the pair has a slot of its own", y="own_accuracy"),
            Panel(title="where it has none", y="shared_accuracy"),
            Panel(title=f"{longest} tokens: tokens per slot", x="slices", y="slot_counts", at_length=longest),
            Panel(title=f"{part}, the oldest token of a slot", x="slices", y="oldest", at_length=longest),
            Panel(title=f"{part}, its mean token", x="slices", y="mean_position", at_length=longest),
        ),
    )


FIGURES: dict[str, Callable[[Preset], Figure]] = {
    "fidelity": fidelity,
    "recall": partial(
        _mixers_by_length,
        task="recall",
        title="Basic in-context recall beyond the training length",
        note="The number of pairs grows with the length: a fifth of the context's tokens belong to them.",
    ),
    "positional": positional,
    "regression": regression,
    "mqar": partial(
        _mixers_by_length,
        task="mqar",
        title="Multi-query associative recall (Zoology)",
        note="A quarter as many pairs as tokens, up to 256, from a vocabulary of 8,192.",
    ),
    "bytes": state_size,
    "dictionary": dictionary,
    "narrow": narrow,
    "kept": kept,
    **ablations.FIGURES,
    **scaled.FIGURES,
    "lm": language,
    "hybrids": hybrids,
    "needle": needle,
    "long": longer,
    **rivals.FIGURES,
}
"""All figures by their names on the command line, in the order of `--all`."""


TEXT_FIGURES = (
    *("lm", "hybrids", "needle", "long", "logn-needles", "rivals-needles"),
    *(name for name in rivals.FIGURES if name.startswith("rivals-lm")),
)
"""Figures that can be made of any corpus."""


GROUPS = {
    group: tuple(name for name in FIGURES if name.startswith(f"{group}-")) for group in ("rivals", "logn")
}
"""Groups of figures by their common names on the command line."""


def get_figure(
    name: str,
    preset: Preset,
    *,
    dataset: str | None = None,
    held_out: float | None = None,
    mixers: Sequence[str] = (),
) -> Figure:
    """The figure of this name in `FIGURES`. Figures of language models can use another corpus and held-out
    share, which are then part of their name. Figures that compare mixers can have others, `mixers`, as well.

    Example:
        >>> from ovq_lab.figures.presets import CPU
        >>> [panel.title for panel in get_figure("recall", CPU).panels]
        ['accuracy', 'memory']
    """
    if name not in FIGURES:
        raise ValueError(
            f"expected figures among {', '.join([*FIGURES, *GROUPS])}, found {name!r}"
            f"{did_you_mean(name, [*FIGURES, *GROUPS])}"
        )
    if dataset is None and held_out is None:
        figure = FIGURES[name](preset)
    elif name not in TEXT_FIGURES:
        raise ValueError(
            f"--dataset, --held-out: expected figures among {', '.join(TEXT_FIGURES)}, found {name!r}"
        )
    else:
        figure = of_corpus(FIGURES[name], preset, dataset=dataset, held_out=held_out)
    for mixer in mixers:
        figure = _with_mixer(figure, mixer, preset.mixer_fields.get(mixer, {}))
    return figure


def _with_mixer(figure: Figure, mixer: str, fields: Mapping[str, Any]) -> Figure:
    """The figure with lines of another mixer, with these model fields, wherever full attention has one."""
    mixer_class(mixer)
    compared = {line.config.mixer for line in figure.lines}
    # Full attention and OVQ alone are in ablations as well.
    if len(compared) < 3:
        raise ValueError(f"--mixer: expected figures that compare mixers, found {figure.name!r}")
    if mixer in compared:
        raise ValueError(f"--mixer: expected a mixer that {figure.name} lacks, found {mixer!r}")

    def with_it(config: RunConfig) -> RunConfig:
        types = tuple(mixer if each == "full_attention" else each for each in config.model.mixer_types)
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, mixer_types=types, **fields)
        )

    label = MIXER_NAMES.get(mixer, mixer)
    added = (
        dataclasses.replace(
            line,
            label=line.label.replace(MIXER_NAMES["full_attention"], label).replace(
                f"{label} and {label}", f"{label} alone"
            ),
            config=with_it(line.config),
            trial_of=line.trial_of and with_it(line.trial_of),
        )
        for line in figure.lines
        if line.config.mixer == "full_attention"
    )
    arguments = f"{figure.arguments or figure.name} --mixer {mixer}"
    return dataclasses.replace(figure, lines=(*figure.lines, *added), arguments=arguments)
