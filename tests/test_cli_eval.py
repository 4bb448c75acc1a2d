"""`ovq eval lm` and `ovq eval needle`: what the library measures, in tables, figures and JSON."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from ovq.hf import OVQConfig, OVQForCausalLM
from ovq_lab.eval.language import evaluate_language
from ovq_lab.eval.needle import evaluate_needle
from ovq_lab.eval.reading import token_bytes
from ovq_lab.text import byte_tokenizer
from ovq_lab.text.haystack import NeedleBuilder, essay_texts
from ovq_lab.train.recipes import get_recipe
from tests.progress import Seen
from tests.test_cli import fail, run
from tests.tiny import save_reader, tiny_model

BYTES = byte_tokenizer()
TEXT = " ".join(f"This is sentence {i} of a text that is made up." for i in range(60))


def save_model(folder, mixer):
    fields = {"num_slots": 4, "chunk_size": 16, "sliding_window": 8, "initializer_range": 0.3}
    return save_reader(folder, mixer_types=["sliding_attention", mixer], **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models `a/ovq`, `b/ovq` and `mamba2`, one without a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("models")
    for name, mixer in (("a/ovq", "ovq"), ("b/ovq", "ovq"), ("mamba2", "mamba2"), ("mute", "ovq")):
        save_model(folder / name, mixer)
    for path in (folder / "mute").glob("tokenizer*"):
        path.unlink()
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def load(folder):
    return OVQForCausalLM.from_pretrained(folder).eval()


def quiet(evaluate, *arguments, **options):
    return [dataclasses.asdict(row) for row in evaluate(*arguments, reporter=Seen(), **options)]


def without_speed(rows):
    return [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
        for row in json.loads(json.dumps(rows))
    ]


def test_lm_prints_what_the_library_measures(folder, capsys, tmp_path):
    arguments = ["eval", "lm", "--model", folder / "a/ovq", "--model", folder / "mamba2"]
    arguments += ["--dataset", folder / "text.txt", "--split", "all", "--lengths", "100,900", "--windows", 2]
    arguments += ["--num-slots", "2,40", "--block-size", 64, "--piece-size", 200]
    results = json.loads(run(capsys, *arguments, "--json", "--out", tmp_path))
    ids = np.array(list(TEXT.encode()))
    options = {"lengths": [100, 900], "num_windows": 2, "block_size": 64, "num_slots": [2, 40]}
    options |= {"bytes_of_tokens": token_bytes(BYTES), "first_token": 256}
    expected = [
        row
        for name in ("a/ovq", "mamba2")
        for row in quiet(evaluate_language, load(folder / name), [ids], piece_size=200, **options)
    ]
    assert without_speed(results["rows"]) == without_speed(expected)
    assert json.loads((tmp_path / "lm.json").read_text()) == results
    assert {path.name for path in tmp_path.iterdir()} == {"lm.json", "loss.png", "chunk.png"}
    table = run(capsys, *arguments)
    for row in expected:
        assert f"{row['loss']:.4f}" in table
        assert f"{row['bits_per_byte']:.4f}" in table
    assert "OVQ, 40 slots" in table
    assert "Mamba2" in table


def test_slots_that_open_at_random_are_the_same_each_time(folder, capsys, tmp_path):
    torch.manual_seed(0)
    OVQForCausalLM(OVQConfig.from_pretrained(folder / "a/ovq", init="random")).save_pretrained(tmp_path)
    BYTES.save_pretrained(tmp_path)
    arguments = ["eval", "lm", "--model", tmp_path, "--dataset", folder / "text.txt", "--split", "all"]
    arguments += ["--lengths", 900, "--windows", 1, "--num-slots", 4, "--json"]
    losses = set()
    for seed in range(3):
        torch.manual_seed(seed)
        losses.add(json.loads(run(capsys, *arguments))["rows"][0]["loss"])
    assert len(losses) == 1


def test_json_has_no_number_for_the_loss_of_a_model_that_diverged(folder, capsys, tmp_path):
    model = OVQForCausalLM.from_pretrained(folder / "a/ovq")
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    model.save_pretrained(tmp_path)
    BYTES.save_pretrained(tmp_path)
    arguments = ["eval", "lm", "--model", tmp_path, "--dataset", folder / "text.txt", "--split", "all"]
    out = run(capsys, *arguments, "--lengths", 50, "--windows", 1, "--json")
    [row] = json.loads(out, parse_constant=pytest.fail)["rows"]
    assert row["loss"] is None


def test_models_of_one_mixer_are_called_by_their_folders(folder, capsys):
    arguments = ["eval", "lm", "--dataset", folder / "text.txt", "--split", "all"]
    arguments += ["--lengths", "50", "--windows", 1, "--json"]

    def names(*models):
        options = [argument for name in models for argument in ("--model", folder / name)]
        return [row["name"] for row in json.loads(run(capsys, *arguments, *options))["rows"]]

    assert names("a/ovq", "mamba2") == ["", ""]
    assert names("a/ovq", "b/ovq") == [str(folder / "a/ovq"), str(folder / "b/ovq")]


def test_several_models_of_one_synthetic_task_are_rows_of_one_table(capsys, tmp_path):
    for seed, (name, mixer) in enumerate([("first", "ovq"), ("second", "ovq"), ("third", "mamba2")]):
        model = tiny_model(seed, mixer_types=["sliding_attention", mixer], num_slots=4, chunk_size=16)
        model.save_pretrained(tmp_path / name)
        get_recipe("recall-ovq").save(tmp_path / name)

    def evaluated(*names, options=("--json",)):
        folders = [word for name in names for word in ("--model", tmp_path / name)]
        return run(capsys, "eval", *folders, "--lengths", "32,64", "--examples", 4, *options)

    both = json.loads(evaluated("first", "second"))
    assert both["models"] == [str(tmp_path / "first"), str(tmp_path / "second")]
    assert [row["name"] for row in both["rows"]] == ["first"] * 2 + ["second"] * 2
    # Each as if it were tested alone.
    alone = [row for name in ("first", "second") for row in json.loads(evaluated(name))["rows"]]
    assert [row | {"name": ""} for row in both["rows"]] == alone
    table = evaluated("first", "second", options=())
    assert "first, 4 slots" in table
    assert "second, 4 slots" in table
    assert "Mamba2" in evaluated("first", "third", options=())
    get_recipe("mqar-ovq").save(tmp_path / "third")
    folders = ["--model", tmp_path / "first", "--model", tmp_path / "third"]
    line = fail(capsys, "eval", *folders)
    assert line.startswith(f"{tmp_path / 'third'}: expected the task of {tmp_path / 'first'}, RecallTask(")
    assert ", found MQARTask(" in line


def test_lm_reads_what_a_model_was_trained_on(folder, capsys, tmp_path):
    save_model(tmp_path / "run", "ovq")
    settings = [f"task.dataset={folder / 'text.txt'}", "task.held_out=0", "task.carry_state=true"]
    config = get_recipe("lm-ovq").override([*settings, "train.lengths=64", "train.length_shares=1"])
    config.save(tmp_path / "run")
    arguments = ["eval", "lm", "--model", tmp_path / "run", "--lengths", "200", "--windows", 1, "--json"]
    given = ["--dataset", folder / "text.txt", "--split", "all"]
    found = [json.loads(run(capsys, *arguments, *options)) for options in (["--split", "train"], given)]
    assert without_speed(found[0]["rows"]) == without_speed(found[1]["rows"])
    assert (found[0]["source"]["held_out"], found[1]["source"]["held_out"]) == (0, 0.1)
    other = json.loads(run(capsys, *arguments, "--split", "all", "--held-out", 0.5))
    assert other["source"]["held_out"] == 0.5


def test_needle_prints_what_the_library_measures(folder, capsys, tmp_path):
    arguments = ["eval", "needle", "--model", folder / "a/ovq", "--lengths", "330", "--depths", "0,100"]
    arguments += ["--num-slots", "40", "--examples", 1, "--distractors", 2, "--seed", 3, "--value", "word"]
    essays = ["--haystack", "essay", "--dataset", folder / "text.txt", "--split", "all"]
    for options, texts, out in (([], [], "noise"), (essays, [TEXT], "essay")):
        results = json.loads(run(capsys, *arguments, *options, "--json", "--out", tmp_path / out))
        builder = NeedleBuilder(BYTES, haystack=out, value="word", num_distractors=2, texts=texts)
        expected = quiet(
            evaluate_needle,
            load(folder / "a/ovq"),
            builder,
            lengths=[330],
            depths=[0, 1],
            num_slots=[40],
            num_examples=1,
            seed=3,
        )
        assert results["rows"] == expected
        assert json.loads((tmp_path / out / "needle.json").read_text()) == results
        assert len(list((tmp_path / out).glob("needle_*.png"))) == 3
    table = run(capsys, *arguments)
    assert "OVQ, 40 slots" in table
    assert "100%" in table


def test_essays_are_of_what_a_model_was_not_trained_on(folder, capsys, monkeypatch, tmp_path):
    lines = [{"body": f"{TEXT} It is the end of document {number}."} for number in range(20)]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_model(tmp_path / "run", "ovq")
    settings = [f"task.dataset={tmp_path / 'books.jsonl'}", "task.text_field=body", "task.held_out=0.5"]
    get_recipe("lm-ovq").override(settings).save(tmp_path / "run")
    read = []

    def spy(source, split, length):
        read.append((source, essay_texts(source, split, length)))
        return read[-1][1]

    monkeypatch.setattr("ovq_lab.text.haystack.essay_texts", spy)
    arguments = ["eval", "needle", "--model", tmp_path / "run", "--haystack", "essay", "--json"]
    arguments += ["--lengths", "330", "--depths", "50", "--examples", 1, "--distractors", 1]
    results = json.loads(run(capsys, *arguments))
    run(capsys, *arguments, "--split", "train")
    run(capsys, *arguments, "--dataset", folder / "text.txt", "--split", "all", "--max-documents", 1)
    (own, held_out), (_, trained_on), (other, texts) = read
    assert (own.text_field, own.held_out) == ("body", 0.5)
    assert results["source"]["text_field"] == "body"
    assert all("end of document" in text for text in held_out + trained_on)
    assert not {*held_out} & {*trained_on}
    assert (other.text_field, other.max_documents) == ("text", 1)
    assert texts == [TEXT]


def test_help_shows_examples(capsys):
    for command in ("lm", "needle", "harness"):
        out = " ".join(run(capsys, "eval", command, "--help").split())
        assert f"Example: ovq eval {command} --model runs/ovq" in out
    assert "./lab[harness]" in run(capsys, "eval", "harness", "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("eval lm --dataset x", "Missing option '--model'"),
        ("eval lm --model {m}", "found no run_config.json in it; other models need --dataset"),
        ("eval lm --model {recall}", "--dataset: expected one, as"),
        ("eval --model {recall} --seed 4294967296", "--seed: expected 0 to 4294967295, found 4294967296"),
        ("eval --model {lm}", "expected a run on a synthetic task, found one on text: ovq eval lm"),
        (
            "eval --model {m} lm --model {m} --dataset x",
            "eval lm: expected options after lm, found model before it",
        ),
        ("eval lm --model {tmp} --dataset x", "found no config.json in it"),
        ("eval lm --model {m} --dataset {tmp}/no.txt", "dataset: expected"),
        ("eval lm --model {m} --dataset {text} --split tset", "split: expected one of train"),
        ("eval lm --model {m} --dataset {text} --split all --lengths 9999", "length: expected at most 2810"),
        (
            "eval lm --model {mute} --dataset {text} --split all",
            "expected a tokenizer beside the model, found",
        ),
        ("eval lm --model {m} --dataset {text} --num-slots 0", "--num-slots: expected positive integers"),
        ("eval needle --model {m} --depths 0,101", "--depths: expected numbers from 0 to 100"),
        ("eval needle --model {m} --depths a", "--depths: expected numbers from 0 to 100"),
        ("eval needle --model {m} --haystack hay", "haystack: expected one of noise, essay, found 'hay'"),
        ("eval needle --model {m} --value name", "value: expected one of word, number, uuid, found 'name'"),
        (
            "eval needle --model {m} --haystack essay",
            "expected the folder of a training run, found no run_config.json",
        ),
        ("eval needle --model {recall} --haystack essay", "--dataset: expected one, as"),
        ("eval needle --model {m} --dataset {text}", "--dataset: expected only with --haystack essay, found"),
        (
            "eval needle --model {m} --text-field body",
            "--text-field: expected only with --haystack essay, found 'body'",
        ),
        ("eval needle --model {m} --lengths 100", "length: expected room for a sentence beside the"),
        ("eval needle --model {mute}", "expected a tokenizer beside the model, found none"),
        ("eval harness --model {m}", "Missing option '--tasks'"),
        (
            "eval harness --model {m} --model {lm} --tasks x",
            "--model: expected one folder, found {m}, {lm}",
        ),
    ],
)
def test_bad_input_costs_one_line(arguments, message, folder, capsys, tmp_path):
    names = {"m": folder / "a/ovq", "mute": folder / "mute", "text": folder / "text.txt", "tmp": tmp_path}
    for name in ("recall", "lm"):
        get_recipe(f"{name}-ovq").save(tmp_path / name)
        shutil.copy(folder / "a/ovq/config.json", tmp_path / name)
        names[name] = tmp_path / name
    assert message.format(**names) in fail(capsys, *(word.format(**names) for word in arguments.split()))
