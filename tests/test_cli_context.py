"""`ovq context build` and `info`, `ovq generate --context`: a document read once, and prompts after it."""

import io
import json
import logging
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ovq.cli import main
from tests.disks import full_disk
from tests.test_cli import fail, run
from tests.tiny import tiny_model

DOCUMENT = " ".join(str(i * 17 % 48) for i in range(1, 90))


def save_model(folder, seed=0, **changes):
    # Large weights, so that what is remembered shows in what is said.
    fields = {"vocab_size": 48, "hidden_size": 24, "num_slots": 8, "chunk_size": 4, "initializer_range": 0.5}
    tiny_model(seed, **{**fields, "sliding_window": 4, **changes}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(DOCUMENT)
    return path


def build(capsys, model, text, out, *options):
    return run(capsys, "context", "build", "--model", model, "--text", text, "--out", out, *options)


def test_prompts_from_a_context_get_the_answers_of_the_whole_text(capsys, model, text, tmp_path):
    out = tmp_path / "book.ctx"
    said = build(capsys, model, text, out, "--prefill-chunk-size", 13)
    assert " ".join(said.split()).startswith(f"Saved what the model remembers of 89 tokens in {out}")
    before = out.read_bytes()
    answers = set()
    for prompt in ("5 40 1", "7", "5 40 1"):
        for options in ([], ["--num-beams", 3], ["--temperature", 2, "--seed", 4]):
            command = ["generate", "--model", model, "--max-new-tokens", 9, *options]
            answer = run(capsys, *command, "--context", out, "--prompt", prompt)
            assert answer == run(capsys, *command, "--prompt", f"{DOCUMENT} {prompt}")
            answers.add(answer)
    assert len(answers) >= 4
    assert out.read_bytes() == before


def test_building_again_replaces_the_file(capsys, model, text, tmp_path, monkeypatch):
    out = tmp_path / "book.ctx"
    out.write_text("of yesterday")
    build(capsys, model, text, out)
    first = load_file(out)
    monkeypatch.setattr(sys, "stdin", io.StringIO(DOCUMENT))
    build(capsys, model, "-", out)
    for name, tensor in load_file(out).items():
        assert torch.equal(first[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["book.ctx"]


def test_another_dictionary_is_part_of_the_context(capsys, model, text, tmp_path):
    out = tmp_path / "book.ctx"
    build(capsys, model, text, out, "--num-slots", 64)
    command = ["generate", "--model", model, "--prompt", "7 8", "--context", out]
    assert "num_slots=8, as the model has, found num_slots=64" in fail(capsys, *command)
    wide = [*command[:5], "--num-slots", 64]
    expected = run(capsys, *wide[:4], f"{DOCUMENT} 7 8", "--num-slots", 64)
    assert run(capsys, *wide, "--context", out) == expected


def test_another_rule_is_part_of_the_context(capsys, model, text, tmp_path):
    out = tmp_path / "book.ctx"
    rule = ["--merge", "nearest", "--state-dtype", "int8"]
    build(capsys, model, text, out, *rule)
    command = ["generate", "--model", model, "--prompt", "7 8"]
    line = fail(capsys, *command, "--context", out)
    assert "merge='existing', as the model has, found merge='nearest'" in line
    line = fail(capsys, *command, "--context", out, *rule[:2])
    assert "state_dtype='float32', as the model has, found state_dtype='int8'" in line
    expected = run(capsys, *command[:4], f"{DOCUMENT} 7 8", *rule)
    assert run(capsys, *command, "--context", out, *rule) == expected


def test_slots_opened_at_random_depend_on_the_seed(capsys, text, tmp_path):
    model = save_model(tmp_path / "model", init="random")
    command = ["generate", "--model", model, "--max-new-tokens", 9, "--seed", 3]
    expected = run(capsys, *command, "--prompt", f"{DOCUMENT} 7 8")
    for seed in (3, 4):
        build(capsys, model, text, tmp_path / f"{seed}", "--seed", seed)
    assert run(capsys, *command, "--context", tmp_path / "3", "--prompt", "7 8") == expected
    sums = [load_file(tmp_path / seed)["layers.1.key_sum"] for seed in ("3", "4")]
    assert not torch.equal(*sums)


def test_a_prompt_after_a_document_is_not_marked_as_a_beginning(capsys, tmp_path, caplog, monkeypatch):
    words = {word: i for i, word in enumerate(["<s>", "one", "two", "three", "four"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = save_model(tmp_path / "model", vocab_size=5)
    # Shorter than the document: how much a model can read is not the tokenizer's business.
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=4).save_pretrained(
        folder
    )
    (tmp_path / "text").write_text("two four one two four three")
    # transformers keeps its records from the root logger, where caplog listens.
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    assert "of 7 tokens" in build(capsys, folder, tmp_path / "text", tmp_path / "c")
    assert "longer than" not in caplog.text
    command = ["generate", "--model", folder, "--max-new-tokens", 8]
    expected = run(capsys, *command, "--prompt", "two four one two four three one two")
    assert run(capsys, *command, "--context", tmp_path / "c", "--prompt", "one two") == expected


def test_a_full_disk_costs_one_line_and_leaves_the_old_file(capsys, model, text, tmp_path):
    out = tmp_path / "book.ctx"
    out.write_text("of yesterday")
    with full_disk(1000), pytest.raises(SystemExit) as exit_info:
        main(["context", "build", "--model", str(model), "--text", str(text), "--out", str(out)])
    assert exit_info.value.code == 2
    # After the progress of reading.
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"ovq: error: {out}: cannot be written (")
    assert sum("error" in line for line in said) == 1
    assert out.read_text() == "of yesterday"
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_tells_what_it_is_and_holds(capsys, model, text, tmp_path):
    out = tmp_path / "book.ctx"
    build(capsys, model, text, out)
    said = run(capsys, "context", "info", out)
    assert "89 tokens" in said
    assert [line.split("│")[4].strip() for line in said.splitlines() if "│ ovq " in line] == ["7 of 8"]
    found = json.loads(run(capsys, "context", "info", out, "--json"))
    window, dictionary = found["layers"]
    assert (found["num_tokens"], found["dtype"]) == (89, "torch.float32")
    assert (window["mixer"], dictionary["mixer"]) == ("sliding_attention", "ovq")
    assert window["bytes"] + dictionary["bytes"] == found["bytes"]
    tensors = load_file(out)
    count = tensors["layers.1.count"]
    assert dictionary["num_open"] == count.shape[2] == 7
    assert (dictionary["num_slots"], dictionary["num_pending"]) == (8, 1)
    assert dictionary["largest_count"] == int(count.max())
    assert dictionary["single_share"] == (count == 1).sum() / count.numel()
    shares = count / 88
    expected = (-shares * shares.log()).sum(-1).exp().mean()
    assert dictionary["effective_slots"] == pytest.approx(float(expected))


def test_a_file_that_is_none_costs_one_line(capsys, model, text, tmp_path):
    out = tmp_path / "book.ctx"
    assert fail(capsys, "context", "info", out) == f"{out}: expected a saved context, found no such file"
    build(capsys, model, text, out)
    content = out.read_bytes()
    out.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "it is damaged" in fail(capsys, "context", "info", out)
    assert "expected format 'ovq-context', found 'pt'" in fail(
        capsys, "context", "info", model / "model.safetensors"
    )


def test_help_shows_an_example(capsys):
    assert "Example: ovq context info book.ctx" in run(capsys, "context", "info", "--help")
    assert "Example: ovq context build --model runs/ovq" in run(capsys, "context", "build", "--help")
    assert "--context book.ctx" in " ".join(run(capsys, "generate", "--help").split())
    assert "build" in run(capsys, "context", "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("context bild", "No such command 'bild'"),
        ("context build --model {model} --out {tmp}/c", "Missing option '--text'"),
        ("context build --model {tmp} --text {text} --out {tmp}/c", "found no config.json in it"),
        ("context build --model {model} --text {tmp}/no --out {tmp}/c", "No such file"),
        (
            "context build --model {model} --text {text} --out {tmp}/no/c",
            "--out: expected a file in a folder",
        ),
        ("context build --model {model} --text {text} --out {tmp}", "--out: expected a file in a folder"),
        (
            "context build --model {model} --text {tmp}/words --out {tmp}/c",
            "--text: expected token ids such as",
        ),
        (
            "context build --model {model} --text {tmp}/empty --out {tmp}/c",
            "--text: expected at least one token",
        ),
        (
            "context build --model {model} --text {tmp}/high --out {tmp}/c",
            "--text: expected token ids from 0 to 47",
        ),
        (
            "context build --model {model} --text {tmp}/words --out {tmp}/words",
            "--out: expected another file than the text that was read",
        ),
        (
            "context build --model {model} --text {text} --out {tmp}/c --prefill-chunk-size 0",
            "--prefill-chunk",
        ),
        (
            "generate --model {model} --prompt 1 --context {tmp}/no",
            "--context: expected a file of ovq context",
        ),
        ("generate --model {model} --prompt 1 --context {tmp}/words", "damaged or foreign"),
        ("generate --model {other} --prompt 1 --context {ctx}", "found one of other weights"),
        (
            "generate --model {cut} --prompt 1",
            "expected the weights of a saved model, found a file that is dama",
        ),
        ("generate --model {wider} --prompt 1 --context {ctx}", "sliding_window=6, as the model has"),
    ],
)
def test_bad_input_costs_one_line(arguments, message, capsys, model, text, tmp_path):
    for name, content in (("words", "one two"), ("empty", ""), ("high", "1 48")):
        (tmp_path / name).write_text(content)
    names = {"model": model, "text": text, "tmp": tmp_path, "ctx": tmp_path / "book.ctx"}
    if "{ctx}" in arguments:
        build(capsys, model, text, tmp_path / "book.ctx")
        names["other"] = save_model(tmp_path / "other", seed=1)
        names["wider"] = save_model(tmp_path / "wider", sliding_window=6)
    if "{cut}" in arguments:
        weights = save_model(tmp_path / "cut") / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        names["cut"] = tmp_path / "cut"
    assert message in fail(capsys, *(word.format(**names) for word in arguments.split()))
