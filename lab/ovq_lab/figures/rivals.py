"""The figures `rivals-*`: OVQ against the mixers readers ask about first, at equal bytes and parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from ovq.ops.options import BEST_MERGE
from ovq_lab.figures.evaluations import Evaluation, LossEvaluation, NeedlesEvaluation
from ovq_lab.figures.plan import Figure, Line, Panel, Variant, position_panels
from ovq_lab.figures.presets import Preset
from ovq_lab.mixers.names import MIXER_NAMES
from ovq_lab.train.config import RunConfig
from ovq_lab.train.recipes import beside

RIVALS = (
    "full_attention",
    "ovq",
    "kvm",
    "raven",
    "gated_deltanet",
    "kda",
    "mesanet",
    "mamba2",
    "sink_attention",
)
"""The mixers compared, in the order of legends. To compare another, add its name here."""

PARTNERS = ("mamba2", "gated_deltanet", "kda")
"""Short-range mixers beside which all are compared on text, in addition to windows."""

FULL = MIXER_NAMES["full_attention"]

_NEEDLES = {
    "S1, a number in noise": ("number", "noise"),
    "S2, a number in an essay": ("number", "essay"),
    "S3, a uuid in an essay": ("uuid", "essay"),
}
"""Kinds of value and of haystack, by RULER's names for these needle tasks."""

NEEDLE_FACTORS = (1, 2, 4, 8)
"""Needle test lengths, as multiples of the training length."""

# Questions are the same at every depth, and few per seed; so more questions are better than more depths.
_NEEDLE_DEPTHS = (0.0, 0.5, 1.0)
_QUESTIONS_FACTOR = 2

# Trials are judged by more questions, at the length that the main table shows: within the training length
# two settings often find all, and what they find beyond it differs.
_NEEDLE_TRIAL_FACTOR, _NEEDLE_TRIAL_QUESTIONS = 2, 4

VALIDATION_FACTOR = 4
"""Trials are judged at this multiple of the training length: at that length itself several are perfect."""

_NOTE = (
    "States have equal bytes: those of full dictionaries of OVQ, of KVM's slots and window, and of a window "
    "with sinks; the others have what they can at equal parameters. OVQ is trained by the paper's rule, and "
    "the same weights are evaluated by nearest. With a merge gate or a forget gate it is another model, "
    "trained with the settings that are best without."
)

ACCURACY = Panel(title="accuracy")


def _lines(
    preset: Preset,
    task: str,
    evaluations: Sequence[Evaluation],
    validation: Evaluation,
    *,
    group: str = "",
    partner: str | None = None,
    trial_merge: str | None = None,
) -> list[Line]:
    """A line for each model of a task, with `partner` in place of its windows if given.

    Beside a partner, also OVQ and full attention with a forget gate and an output gate. Windows would have
    that gate as well, which they lack beside the other mixers.

    All models have the same evaluations and the same validation. All lines of OVQ have the same weights, so
    one merge rule, `trial_merge`, judges its trials; None for that of training.
    """

    def line(label: str, mixer: str, merge: str | None = None, *gates: str) -> Line:
        def config(mixer: str, *gates: str) -> RunConfig:
            found = preset.config(task, mixer, **{f"{gate}_gate": True for gate in gates if gate != "output"})
            found = found if partner is None else beside(partner, found)
            return _with_output_gates(found) if "output" in gates else found

        return Line(
            label=label,
            config=config(mixer, *gates),
            evaluations=tuple(dataclasses.replace(each, merge=merge) for each in evaluations),
            group=group,
            trial_of=config("full_attention" if mixer == "fox" else mixer) if gates else None,
            validation=dataclasses.replace(validation, merge=trial_merge if mixer == "ovq" else None),
            variants=_variants(preset, task).get(mixer, ((),)),
        )

    slots = f"{preset.configs[task].model.num_slots} slots"
    lines = []
    for mixer in RIVALS:
        if mixer != "ovq":
            lines.append(line(MIXER_NAMES.get(mixer, mixer), mixer))
            continue
        lines += [line(f"OVQ, {slots}", mixer), line(f"OVQ, nearest, {slots}", mixer, BEST_MERGE)]
        lines += [
            line(f"OVQ, {gate} gate, nearest, {slots}", mixer, BEST_MERGE, gate)
            for gate in ("merge", "forget")
        ]
        if partner is not None:
            label = "forget and output gates"
            lines.append(line(f"OVQ, {label}, nearest, {slots}", mixer, BEST_MERGE, "forget", "output"))
            lines.append(line(f"full attention, {label}", "fox", None, "output"))
    return lines


def _with_output_gates(config: RunConfig) -> RunConfig:
    """The same run with output gates, and with heads so much smaller that it has no more parameters.

    An attention layer has five projections then, in the place of four.
    """
    model = config.model
    head_dim = (model.head_dim or model.hidden_size // model.num_attention_heads) * 4 // 5
    own = (*model.mixer_fields, "output_gate=true")
    return dataclasses.replace(config, model=dataclasses.replace(model, head_dim=head_dim, mixer_fields=own))


def _variants(preset: Preset, task: str) -> dict[str, tuple[Variant, ...]]:
    """Configurations of mixers to try in addition to optimizer settings, where their authors leave a choice.

    KVM: growth of the slots as in `kvm_swa_saturate1024_wd.yaml`, its published configuration that is nearest
    to ours, or immediate. Raven: as many slots as components per head, or twice as many, which gives most
    bytes at equal parameters, as its router then takes half of them.
    """
    model = preset.configs[task].model
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    return {
        "kvm": tuple((("kvm_growth", growth),) for growth in ("plateau", "immediate")),
        "raven": tuple((("raven_slots", num_slots),) for num_slots in (head_dim, 2 * head_dim)),
    }


def _by_length(preset: Preset, name: str, title: str, quality: Panel = ACCURACY, note: str = _NOTE) -> Figure:
    """A synthetic task at the standard evaluation lengths."""
    task, longest = preset.task(name), VALIDATION_FACTOR * preset.train_length(name)
    return Figure(
        name=f"rivals-{name}",
        title=f"{title}, at equal bytes or fewer",
        note=note,
        lines=tuple(
            _lines(
                preset,
                name,
                [preset.evaluation(task.at_length(length)) for length in preset.near_lengths(name)],
                preset.evaluation(task.at_length(longest)),
            )
        ),
        panels=(quality, Panel(title="memory", y="state_bytes")),
        trials=preset.trials,
    )


def _needles(preset: Preset) -> Figure:
    """Needles of three kinds by length, as means over depths."""
    lines, trained = [], preset.train_length("needles")
    for group, (value, haystack) in _NEEDLES.items():
        evaluation = needle_evaluation(preset, value, haystack)
        # One validation for all kinds: numbers in essays, as in training.
        validation = dataclasses.replace(
            evaluation,
            split="validation",
            haystack="essay",
            value="number",
            length=_NEEDLE_TRIAL_FACTOR * trained,
            num_examples=_NEEDLE_TRIAL_QUESTIONS * evaluation.num_examples,
        )
        lines += _lines(
            preset,
            "needles",
            [dataclasses.replace(evaluation, length=trained * factor) for factor in NEEDLE_FACTORS],
            validation,
            group=group,
            trial_merge=BEST_MERGE,
        )
    return Figure(
        name="rivals-needles",
        title="Needles of three kinds, hidden in noise or held-out text "
        f"({preset.text_task('needles').dataset}), at equal bytes or fewer",
        note="Share of questions that a model answers with the value, over all depths. Models were trained "
        f"on texts of up to {trained} tokens with numbers or uuids in them. {_NOTE}",
        lines=tuple(lines),
        panels=(
            *(Panel(title=group, y="generated", group=group) for group in _NEEDLES),
            Panel(title="memory", y="state_bytes", group=next(iter(_NEEDLES))),
        ),
        trials=preset.text_trials["needles"],
    )


def needle_evaluation(preset: Preset, value: str, haystack: str) -> NeedlesEvaluation:
    """Needles of one kind at the training length."""
    return NeedlesEvaluation(
        source=preset.text_task("needles"),
        length=preset.train_length("needles"),
        num_examples=_QUESTIONS_FACTOR * preset.text.num_needles,
        value=value,
        haystack=haystack,
        depths=_NEEDLE_DEPTHS,
    )


def _by_position(preset: Preset, name: str, partner: str | None = None) -> Figure:
    """The loss of language models by position, with windows or another short-range mixer as partner."""
    near = "windows" if partner is None else MIXER_NAMES[partner]
    text, source = preset.text, preset.text_task("lm")
    evaluation = LossEvaluation(
        source=dataclasses.replace(source, join_to=text.length),
        length=text.length,
        num_examples=text.num_windows,
    )
    # Windows as long as in training: few documents are longer, and they are not joined here.
    validation = LossEvaluation(
        source=source, length=preset.train_length("lm"), num_examples=text.num_windows, split="validation"
    )
    return Figure(
        name=name,
        title=f"Loss on held-out text ({source.dataset}) beside {near}, at equal bytes or fewer, by position",
        note="Each point is the mean over the octave of positions that ends there, in windows of "
        f"{text.length} tokens that all models of a seed read alike. {_NOTE}",
        lines=tuple(_lines(preset, "lm", [evaluation], validation, partner=partner)),
        panels=position_panels(FULL),
        trials=preset.text_trials["lm"],
    )


FIGURES: dict[str, Callable[[Preset], Figure]] = {
    "rivals-recall": partial(_by_length, name="recall", title="Basic in-context recall"),
    "rivals-positional": partial(_by_length, name="positional", title="Positional in-context recall"),
    "rivals-regression": partial(
        _by_length,
        name="regression",
        title="Linear regression in context: the mean absolute error of y",
        quality=Panel(title="error", y="mean_error"),
        note=f"{_NOTE} Here that rule may merge keys into slots of their own chunk, too.",
    ),
    "rivals-mqar": partial(_by_length, name="mqar", title="Multi-query associative recall (Zoology)"),
    "rivals-needles": _needles,
    "rivals-lm": partial(_by_position, name="rivals-lm"),
    **{
        name: partial(_by_position, name=name, partner=partner)
        for partner in PARTNERS
        for name in [f"rivals-lm-{partner.replace('_', '-')}"]
    },
}
