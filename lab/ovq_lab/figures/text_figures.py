"""The figures of language models: the loss by position, and needles in text."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ovq.ops.options import BEST_MERGE
from ovq_lab.figures.evaluations import Evaluation, LossEvaluation, NeedleEvaluation
from ovq_lab.figures.plan import Figure, Line, Panel, position_panels
from ovq_lab.figures.presets import Preset
from ovq_lab.mixers.names import MIXER_NAMES
from ovq_lab.plots.draw import save_heat_maps
from ovq_lab.train.config import RunConfig
from ovq_lab.train.recipes import beside

# The mixers that the paper compares on text.
_COMPARED = ("full_attention", "ovq", "gated_deltanet", "mamba2", "sliding_attention")

_LOCAL = "mamba2"
"""The short-range mixer of `hybrids`, in place of the windows."""

_MOST_BYTES_PER_TOKEN = 5
"""Bytes of text to join per token of a window if tokens are subwords: enough for every window."""


_NUM_LONG_WINDOWS = 4
"""Number of windows for models of subword tokens that are trained longer."""


class _Model(NamedTuple):
    """Label, run and evaluation dictionary of a compared model."""

    label: str
    config: RunConfig
    num_slots: int | None = None
    merge: str | None = None

    def line(self, evaluations: Sequence[Evaluation], group: str) -> Line:
        """The line of the model, with its dictionary in each evaluation."""
        tested = (
            dataclasses.replace(each, num_slots=self.num_slots, merge=self.merge) for each in evaluations
        )
        return Line(label=self.label, config=self.config, evaluations=tuple(tested), group=group)


def of_corpus(
    make: Callable[[Preset], Figure], preset: Preset, *, dataset: str | None, held_out: float | None
) -> Figure:
    """A figure of another corpus or held-out share, with the corpus in its name."""
    figure = make(preset.on_corpus(dataset, held_out))
    arguments = figure.name
    if dataset is not None:
        arguments += f" --dataset {shlex.quote(dataset)}"
    if held_out is not None:
        arguments += f" --held-out {held_out:g}"
    corpus = dataset or preset.text_task("lm").dataset
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", corpus).strip("-.") or "corpus"
    return dataclasses.replace(figure, name=f"{figure.name}-{slug}", arguments=arguments)


def language(preset: Preset) -> Figure:
    """The loss of language models by position, far beyond the training length."""
    slots = preset.configs["lm"].model.num_slots
    forgetful = _Model(
        f"OVQ, forget gate, nearest, {slots} slots", preset.config("lm", forget_gate=True), slots, BEST_MERGE
    )
    return _by_position(
        preset,
        "lm",
        f"Loss of language models on held-out text ({preset.text_task('lm').dataset}), by position",
        [*_models(preset, "lm"), forgetful],
        relative_to=MIXER_NAMES["full_attention"],
    )


def hybrids(preset: Preset) -> Figure:
    """The loss by position with another short-range mixer in place of the windows."""
    trained = preset.configs["lm"].model.num_slots
    local, windows = MIXER_NAMES[_LOCAL], "windows and"
    full, ovq = preset.config("lm", "full_attention"), preset.config("lm")
    exact = f"{local} and full attention"
    models = [
        _Model(exact, beside(_LOCAL, full)),
        _Model(f"{local} and OVQ, {trained} slots", beside(_LOCAL, ovq), trained),
        _Model(f"{windows} full attention", full),
        _Model(f"{windows} OVQ, {trained} slots", ovq, trained),
        _Model(f"{windows} {MIXER_NAMES['gated_deltanet']}", preset.config("lm", "gated_deltanet")),
        _Model(f"{windows} {local}", preset.config("lm", _LOCAL)),
        _Model("windows alone", preset.config("lm", "sliding_attention")),
    ]
    return _by_position(
        preset,
        "hybrids",
        f"What OVQ stands beside: loss on held-out text ({preset.text_task('lm').dataset}), by position",
        models,
        relative_to=exact,
    )


def longer(preset: Preset) -> Figure:
    """The loss by position of larger models of subword tokens that are trained ten times as long."""
    usual = preset.configs["long"].model
    local = MIXER_NAMES[usual.mixer_types[0]]
    exact = f"{local} and full attention"
    gated = f"{local} and OVQ, ", f", nearest, {usual.num_slots} slots"
    models = [
        _Model(exact, preset.config("long", "full_attention")),
        # Trained with the paper's rule, like the gated layers in the comparison with rivals.
        _Model(f"{gated[0]}merge gate{gated[1]}", preset.config("long", merge_gate=True), merge=BEST_MERGE),
        _Model(f"{gated[0]}forget gate{gated[1]}", preset.config("long", forget_gate=True), merge=BEST_MERGE),
        _Model(f"{local} and {MIXER_NAMES['kvm']}", preset.config("long", "kvm")),
        _Model(f"{local} and {MIXER_NAMES['gated_deltanet']}", preset.config("long", "gated_deltanet")),
        _Model(f"{local} and windows", preset.config("long", "sliding_attention")),
    ]
    return _by_position(
        preset,
        "long",
        f"Loss on held-out text ({preset.text_task('long').dataset}) by position, trained ten times as long",
        models,
        relative_to=exact,
        task="long",
        num_windows=_NUM_LONG_WINDOWS,
    )


def _by_position(
    preset: Preset,
    name: str,
    title: str,
    models: Sequence[_Model],
    *,
    relative_to: str,
    task: str = "lm",
    num_windows: int | None = None,
) -> Figure:
    """The loss of models by position, and its difference in per cent to one of them."""
    length, source = preset.text.length, preset.text_task(task)
    num_bytes = length if source.tokenizer == "bytes" else _MOST_BYTES_PER_TOKEN * length
    evaluation = LossEvaluation(
        source=dataclasses.replace(source, join_to=num_bytes),
        length=length,
        num_examples=num_windows or preset.text.num_windows,
    )
    lines = [model.line([evaluation], group) for group in ("loss", "gap") for model in models]
    return Figure(
        name=name,
        title=title,
        note=f"Each point is the mean over the octave of positions that ends there, in windows of "
        f"{length} tokens that all models of a seed read alike.",
        lines=tuple(lines),
        panels=position_panels(relative_to, groups=("loss", "gap")),
    )


def needle(preset: Preset) -> Figure:
    """Needle retrieval of language models that have learned to look back."""
    text, source = preset.text, preset.text_task("needle")
    lines = []
    for depth in text.needle_depths:
        evaluations = [
            NeedleEvaluation(source=source, length=length, depth=depth, num_examples=text.num_needles)
            for length in text.needle_lengths
        ]
        lines += [model.line(evaluations, f"{depth:.0%}") for model in _models(preset, "needle")]
    longest = preset.train_length("needle")
    return Figure(
        name="needle",
        title=f"A number hidden in held-out text ({source.dataset})",
        note=f"Share of questions that a model answers with the value. Models were trained on texts of up to "
        f"{longest} tokens that have needles in them.",
        lines=tuple(lines),
        panels=tuple(
            Panel(title=f"depth {depth:.0%}", y="generated", group=f"{depth:.0%}")
            for depth in text.needle_depths
        ),
        draw=save_heat_maps,
    )


def _models(preset: Preset, name: str) -> list[_Model]:
    """The compared mixers, each with windows; OVQ with the paper's rule and with ours on the same weights."""
    trained = preset.configs[name].model.num_slots
    models = []
    for mixer in _COMPARED:
        config = preset.config(name, mixer)
        if mixer != "ovq":
            models.append(_Model(MIXER_NAMES[mixer], config))
            continue
        models += [
            _Model(f"{rule}, {trained * factor} slots", config, trained * factor, merge)
            for rule, merge in (("OVQ", None), ("OVQ, nearest", BEST_MERGE))
            for factor in preset.text.slot_factors
        ]
    return models
