"""The configuration of a run: checks, overrides from the command line, and the file beside the run."""

import dataclasses
import itertools
import json
import re
import typing

import pytest
import torch

from ovq.fields import field_types
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.equal_sizes import equal_sizes
from ovq_lab.cli.train import train
from ovq_lab.figures.plan import run_name
from ovq_lab.mixers import MIXERS
from ovq_lab.tasks import TASKS, RecallTask, TextTask
from ovq_lab.train import recipes
from ovq_lab.train.config import CONFIG_FILE, SMALL_MODEL, ModelArgs, RunConfig, TrainArgs
from ovq_lab.train.loop import model_config
from ovq_lab.train.recipes import RECIPES, get_recipe, recipe_for


@pytest.fixture
def config():
    return RunConfig(task=RecallTask(), model=ModelArgs(), train=TrainArgs())


@pytest.mark.parametrize(
    ("assignment", "section", "name", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("train.learning_rate=1e-3", "train", "learning_rate", 1e-3),
        ("train.precision=bfloat16", "train", "precision", "bfloat16"),
        ("model.mixer_types=ovq, full_attention", "model", "mixer_types", ("ovq", "full_attention")),
        ("model.num_key_value_heads=1", "model", "num_key_value_heads", 1),
        ("model.num_key_value_heads=none", "model", "num_key_value_heads", None),
        ("model.rate=0.1", "model", "rate", 0.1),
        ("model.rate=count", "model", "rate", "count"),
        ("task.num_pairs=4", "task", "num_pairs", 4),
    ],
)
def test_a_field_is_set_by_its_path_and_nothing_else_changes(config, assignment, section, name, value):
    changed = config.override([assignment])
    assert getattr(getattr(changed, section), name) == value
    restored = dataclasses.replace(
        getattr(changed, section), **{name: getattr(getattr(config, section), name)}
    )
    assert dataclasses.replace(changed, **{section: restored}) == config


def test_defaults_are_those_of_the_model_or_of_the_small_model():
    of_model = OVQConfig.field_defaults(MIXERS)
    of_run = {field.name: field.default for field in dataclasses.fields(ModelArgs)}
    # The layers of a run are chosen by its recipe.
    differing = {name for name in of_run.keys() & of_model.keys() if of_run[name] != of_model[name]}
    # Left open, for `equal_sizes`.
    every = list(MIXERS)
    is_open = equal_sizes(OVQConfig(num_hidden_layers=len(every), mixer_types=every)).keys() & of_run
    assert {of_run[name] for name in is_open} == {None}
    assert differing | is_open == {"mixer_types", *SMALL_MODEL, *is_open}
    assert {name: of_run[name] for name in SMALL_MODEL} == SMALL_MODEL


def test_any_field_that_a_mixer_declares_can_be_set(config, tmp_path):
    changed = config.override(
        ["model.mixer_types=kvm,raven", "model.kvm_sinks=2", "model.raven_head_dim=none"]
    )
    changed = changed.override(["model.kvm_sinks=0"])
    assert changed.model.mixer_fields == ("kvm_sinks=0", "raven_head_dim=none")
    # Both ways to write it add up.
    again = config.override(["model.mixer_types=kvm,raven", "model.mixer_fields=kvm_sinks=0"])
    both = config.override(
        ["model.mixer_types=kvm,raven", "model.mixer_fields=kvm_sinks=0", "model.raven_head_dim=none"]
    )
    assert both == again.override(["model.raven_head_dim=none"]) == changed
    changed.save(tmp_path)
    assert RunConfig.load(tmp_path) == changed
    assert run_name(changed) != run_name(config.override(["model.mixer_types=kvm,raven"]))
    of_model = model_config(changed)
    # Set, it is not that of `equal_sizes`.
    assert (of_model.kvm_sinks, of_model.raven_head_dim) == (0, None)
    assert not hasattr(of_model, "vq_decay")
    with pytest.raises(ValueError, match="kvm_sinks: expected 'kvm' among mixer_types"):
        model_config(config.override(["model.kvm_sinks=2"]))


def test_fields_that_depend_on_each_other_are_set_together(config):
    changed = config.override(["train.steps=600", "train.length_shares=0.5,0.5", "train.lengths=16,32"])
    assert [changed.train.length_at(step) for step in (0, 299, 300, 599)] == [16, 16, 32, 32]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.steps", r"expected SECTION.FIELD=VALUE, found 'train.steps'"),
        ("steps=3", r"expected SECTION.FIELD=VALUE, found 'steps=3'"),
        ("trian.steps=3", r"expected a section of task, model, train, found 'trian'"),
        ("train.step=3", r"--set train.step: expected one of the fields .*steps.*, found 'step'"),
        ("train.steps=many", r"--set train.steps: expected int, found 'many'"),
        ("train.steps=0", r"train.steps: expected at least 1, found 0"),
        ("train.lengths=64,x", r"--set train.lengths: expected int, found 'x'"),
        (
            "train.lengths=64",
            r"train.length_shares: expected a share for each of the 1 train.lengths, found 3",
        ),
        ("train.lengths=", r"train.lengths: expected at least one length, found none"),
        (
            "train.lengths=2,64,128",
            r"train.lengths: expected lengths at which the task can be built, found 2: length: expected",
        ),
        ("train.length_shares=0.5,0.5,0.5", r"train.length_shares: expected positive numbers that sum to 1"),
        ("train.micro_batches=7", r"train.batch_size: expected a multiple of train.micro_batches \(7\)"),
        ("train.learning_rate=0", r"train.learning_rate: expected a positive number, found 0.0"),
        ("train.adam_beta2=1", r"train.adam_beta2: expected a number in \[0, 1\), found 1.0"),
        ("train.precision=float16", r"train.precision: expected float32 or bfloat16, found 'float16'"),
        ("model.mixer_types=", r"model.mixer_types: expected at least one mixer, found none"),
        ("model.num_slots=0", r"model.num_slots: expected at least 1, found 0"),
        ("model.conv_size=-1", r"model.conv_size: expected at least 0, found -1"),
        ("model.num_attention_heads=3", r"model.hidden_size: expected a multiple of .* \(3\), .*found 64"),
        ("task.vocab_size=5", r"found"),
        (
            "task.length=512",
            r"--set task.length: expected one of train.lengths \(32, 64, 256\), .* found 512",
        ),
        ("train.learning_rate=nan", r"train.learning_rate: expected a finite number, found nan"),
        ("train.learning_rate=inf", r"train.learning_rate: expected a finite number, found inf"),
        ("train.length_shares=0.5,0.5,nan", r"train.length_shares: .* each part a finite number, found"),
        ("train.seed=4294967296", r"train.seed: expected at most 4294967295, found 4294967296"),
        ("model.commitment_weight=-1", r"model.commitment_weight: expected at least 0, found -1.0"),
        ("model.vq_decay=1", r"model.vq_decay: expected a number in \[0, 1\), found 1.0"),
        ("model.rate=0", r"model.rate: expected 'count' or a number in \(0, 1\], found 0.0"),
        ("model.head_dim=0", r"model.head_dim: expected at least 1, found 0"),
        ("model.sink_window=0", r"model.sink_window: expected at least 1, found 0"),
        ("model.kvm_sink=0", r"expected one of the fields .*, found 'kvm_sink'; did you mean 'kvm_sinks'"),
        ("model.kvm_sinks=few", r"--set model.kvm_sinks: expected int, found 'few'"),
        ("model.kda_value_dim=0", r"--set model.kda_value_dim: expected at least 1, found 0"),
        ("model.mixer_fields=5", r"model.mixer_fields: expected NAME=VALUE, found '5'"),
    ],
)
def test_bad_overrides_name_the_field_and_what_was_found(config, assignment, message):
    with pytest.raises(ValueError, match=message):
        config.override([assignment])


NO_NUMBERS = ("nan", "inf", "-inf")


def fields_of(section, kinds):
    """The fields of a dataclass whose type has one of these in it."""
    return [
        name
        for name, kind in field_types(section).items()
        if {kind, *typing.get_args(kind)}.intersection(kinds)
    ]


SECTIONS = [("model", ModelArgs), ("train", TrainArgs)] + [
    ("task", task) for task in (*TASKS.values(), TextTask)
]


@pytest.mark.parametrize(("section", "kind"), SECTIONS)
def test_no_field_takes_what_is_no_finite_number(section, kind, config):
    config = dataclasses.replace(config, **{section: kind()})
    names = fields_of(kind, (int, float))
    assert names
    for name, value in itertools.product(names, NO_NUMBERS):
        with pytest.raises(ValueError, match=f"{name}: expected "):
            config.override([f"{section}.{name}={value}"])


@pytest.mark.parametrize(("section", "kind"), SECTIONS)
def test_no_value_of_another_type_is_read_from_a_file(section, kind, config, tmp_path):
    """What Python's JSON reads, NaN and Infinity included, is checked like what people write."""
    config = dataclasses.replace(config, **{section: kind()})
    wrong = {
        (int, float): ["NaN", "Infinity", "true", "[[1]]", "{}"],
        (int,): ["0.5", '"3"'],
        (bool,): ["1", '"true"', "null"],
        (str,): ["true", "[1]"],
    }
    lists = {"mixer_types", "lengths", "length_shares"}
    for kinds, values in wrong.items():
        for name, value in itertools.product(fields_of(kind, kinds), values):
            sections = json.loads(config.to_json())
            sections[section][name] = "HERE"
            text = json.dumps(sections).replace('"HERE"', f"[{value}]" if name in lists else value)
            (tmp_path / CONFIG_FILE).write_text(text)
            with pytest.raises(ValueError, match=f"{CONFIG_FILE}: .*{name}: expected "):
                RunConfig.load(tmp_path)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_the_file_beside_the_run(name, tmp_path):
    config = get_recipe(name)
    config.save(tmp_path / "run")
    assert RunConfig.load(tmp_path / "run") == config
    # A checkpoint of the run belongs to it.
    (tmp_path / "run" / "checkpoint-5").mkdir()
    assert RunConfig.load(tmp_path / "run" / "checkpoint-5") == config


@pytest.mark.parametrize("task", TASKS)
def test_the_recipes_of_a_task_differ_only_in_the_long_range_mixer(task):
    configs = [config for name, config in RECIPES.items() if name.startswith(f"{task}-")]
    assert {config.mixer for config in configs} == set(MIXERS)
    for config in configs:
        mixer = config.mixer
        assert config.task.name == task
        assert config == recipe_for(task, mixer)
        assert config.model.mixer_types[0] == "sliding_attention"
        assert config.model.mixer_types[1::2] == (mixer,) * (len(config.model.mixer_types) // 2)
    assert len({config.override(["model.mixer_types=ovq"]).to_json() for config in configs}) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_task_of_a_recipe_can_be_built_16_times_as_long(task):
    config = get_recipe(f"{task}-ovq")
    config.task.at_length(16 * max(config.train.lengths))


@pytest.mark.parametrize("task", ["recall", "positional", "mqar"])
def test_most_questions_of_the_shortest_examples_lie_beyond_the_window(task):
    # Otherwise windows answer them alone, and the other layers learn nothing from where a curriculum begins.
    config = recipe_for(task, "ovq")
    _, labels, slices = config.task.at_length(config.train.lengths[0]).build(0, indices=range(64))
    beyond = sum(
        int(mask.sum())
        for name, mask in slices.items()
        if name.startswith("distance") and int(name.split()[1].split("-")[0]) >= config.model.sliding_window
    )
    assert beyond > 0.5 * int((labels != -100).sum())


@pytest.mark.parametrize(
    ("task", "millions"),
    [("lm", 1.88), ("lm-70m", 70), ("lm-120m", 123), ("lm-150m", 150), ("lm-350m", 355), ("lm-480m", 480)],
)
def test_language_models_have_the_sizes_they_are_named_by(task, millions):
    configs = {config.mixer: config for config in (recipe_for(task, mixer) for mixer in MIXERS)}
    assert set(configs.values()) <= set(RECIPES.values())
    assert len({config.override(["model.mixer_types=ovq"]).to_json() for config in configs.values()}) == 1
    for mixer, config in configs.items():
        assert config.model.mixer_types[::2] == ("sliding_attention",) * (len(config.model.mixer_types) // 2)
        assert set(config.model.mixer_types[1::2]) == {mixer}
        with torch.device("meta"):
            model = OVQForCausalLM(model_config(config))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.03)


@pytest.mark.parametrize("task", ["lm", "lm-70m", "lm-150m", "lm-480m"])
def test_ovq_beside_mamba2_has_no_windows_and_as_many_parameters(task):
    sizes = []
    for name in ("ovq", "ovq-mamba2"):
        with torch.device("meta"):
            model = OVQForCausalLM(model_config(get_recipe(f"{task}-{name}")))
        sizes.append(sum(p.numel() for p in model.parameters()))
    config = get_recipe(f"{task}-ovq-mamba2")
    assert config.model.mixer_types == ("mamba2", "ovq") * (len(config.model.mixer_types) // 2)
    assert config.override(["model.mixer_types=ovq"]) == get_recipe(f"{task}-ovq").override(
        ["model.mixer_types=ovq"]
    )
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)


def test_every_language_model_can_be_trained_with_its_state_carried():
    for name in ("lm-ovq", "lm-70m-gdn", "lm-480m-full"):
        assignments = ["task.carry_state=true", "train.micro_batches=1"]
        assert get_recipe(name).override(assignments).task.carry_state


@pytest.mark.parametrize(("task", "billions"), [("lm-120m", 3.1), ("lm-350m", 7.9)])
def test_the_comparison_of_kvm_is_trained_on_as_many_tokens(task, billions):
    args = recipe_for(task, "kvm").train
    assert args.steps * args.batch_size * args.lengths[0] == pytest.approx(billions * 1e9, rel=0.02)
    assert args.learning_rate_decay == "linear"
    # `kvm_swa_saturate1024_wd.yaml` of its authors.
    config = model_config(recipe_for(task, "kvm"))
    assert config.mixer_types[:2] == ["sliding_attention", "kvm"]
    assert (config.kvm_chunk_size, config.kvm_window_chunks, config.sliding_window) == (256, 2, 256)
    assert (config.kvm_growth, config.num_slots, config.kvm_sinks) == ("plateau", 1024, 1)


def test_a_linear_decay_ends_at_zero():
    with pytest.raises(ValueError, match=r"min_learning_rate_share: expected 0 .* found 0\.1"):
        TrainArgs(learning_rate_decay="linear", min_learning_rate_share=0.1)
    with pytest.raises(ValueError, match=r"learning_rate_decay: expected cosine or linear, found 'step'"):
        TrainArgs(learning_rate_decay="step")


def test_there_is_no_recipe_for_an_unknown_task():
    with pytest.raises(ValueError, match=r"task: expected one of recall, .*, found 'tea'"):
        recipe_for("tea", "ovq")


def test_unknown_recipes_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"recipe: expected a task \(recall, .*\(ovq, .*, found 'recall'"):
        get_recipe("recall")
    # OVQ alone alternates with Mamba2 in a recipe.
    with pytest.raises(ValueError, match=r"mamba2; lm also ovq-mamba2\) .* found 'lm-gdn-mamba2'"):
        get_recipe("lm-gdn-mamba2")


def test_the_help_of_train_names_the_parts_of_all_recipes():
    [argument] = typing.get_type_hints(train, include_extras=True)["recipe"].__metadata__
    text = argument.help.replace("; for GPUs ", ", ")
    parts = re.fullmatch(r".* Tasks: (.*)\. Mixers: (.*); of lm also ovq-mamba2\.", text).groups()
    assert [set(names.split(", ")) for names in parts] == [{*recipes._BUILDERS}, {*recipes._MIXERS}]


@pytest.mark.parametrize(
    "damage",
    [
        lambda sections: sections.pop("model"),
        lambda sections: sections["train"].update(speed=3),
        lambda sections: sections["task"].update(name="tea"),
        lambda sections: sections["task"].pop("name"),
        lambda sections: sections["train"].update(steps="many"),
        lambda sections: sections.update(model=[]),
        lambda sections: sections.update(train=None),
    ],
)
def test_a_damaged_file_is_refused_by_its_path(damage, config, tmp_path):
    sections = json.loads(config.to_json())
    damage(sections)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(sections))
    with pytest.raises(ValueError, match=CONFIG_FILE):
        RunConfig.load(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=rf"expected the folder of a training run, found no {CONFIG_FILE}"):
        RunConfig.load(tmp_path)
    (tmp_path / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=CONFIG_FILE):
        RunConfig.load(tmp_path)


def test_the_curriculum_covers_every_step_in_order():
    args = TrainArgs(steps=101, lengths=(8, 16, 32), length_shares=(0.1, 0.2, 0.7))
    lengths = [args.length_at(step) for step in range(args.steps)]
    assert lengths == sorted(lengths)
    assert [lengths.count(length) for length in args.lengths] == [10, 20, 71]
