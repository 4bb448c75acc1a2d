"""The command line: each command does its work, and bad input costs one line and exit code 2."""

import dataclasses
import io
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ovq.cli import main
from ovq.hf import OVQForCausalLM
from ovq_lab.eval.accuracy import evaluate
from ovq_lab.train.config import RunConfig
from tests.progress import Seen
from tests.tiny import TINY, tiny_model


def run(capsys, *arguments):
    """Run a command that is to succeed; its standard output."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert exit_info.value.code in (0, None), captured.err
    return captured.out


def fail(capsys, *arguments):
    """Run a command that is to fail; the one line it says."""
    with pytest.raises(SystemExit) as exit_info:
        main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert exit_info.value.code == 2
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith("ovq: error: ")
    return line.removeprefix("ovq: error: ")


def tiny_settings():
    return [argument for assignment in TINY for argument in ("--set", assignment)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished tiny run."""
    out = tmp_path_factory.mktemp("run")
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "recall-ovq", *tiny_settings(), "--out", str(out / "ovq")])
    assert exit_info.value.code in (0, None)
    return out / "ovq"


def test_train_does_what_it_is_told(trained):
    config = RunConfig.load(trained)
    assert (config.train.steps, config.train.lengths, config.model.num_slots) == (4, (16, 24), 4)
    assert OVQForCausalLM.from_pretrained(trained).config.chunk_size == 4
    assert (trained / "checkpoint-2" / "trainer_state.json").is_file()


@pytest.mark.parametrize(("log_every", "found"), [(1, 3), (100, 4)])
def test_a_run_that_diverged_is_saved_and_fails(log_every, found, capsys, tmp_path):
    changes = ("train.learning_rate=1e30", f"train.log_every={log_every}", "train.save_every=0")
    settings = [*tiny_settings(), *(each for change in changes for each in ("--set", change))]
    with pytest.raises(SystemExit) as exit_info:
        main(["train", "recall-ovq", *settings, "--out", str(tmp_path / "run")])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"ovq: error: {tmp_path / 'run'}: expected finite losses, found none from step {found} on; the model "
        "is saved as it is: train with less than train.learning_rate=1e+30"
    )
    assert (tmp_path / "run" / "README.md").is_file()


def test_train_resumes(trained, capsys, tmp_path):
    # A shell would split this name, and rich would take a part of it for a style.
    folder = tmp_path / "my [bold]run"
    folder.mkdir()
    RunConfig.load(trained).save(folder)
    (trained / "checkpoint-2").rename(folder / "checkpoint-2")
    try:
        out = run(capsys, "train", "--resume", "--out", folder)
    finally:
        (folder / "checkpoint-2").rename(trained / "checkpoint-2")
    assert f"Saved the model and its configuration in {folder}. " in out
    # What is suggested can be pasted, and tests the rule that recalls most, too.
    command = shlex.split(out.split("Test it: ovq ")[1])
    assert command == ["eval", "--model", str(folder), "--merge", "existing,nearest"]
    rules = [row["merge"] for row in json.loads(run(capsys, *command, "--lengths", 24, "--json"))["rows"]]
    assert rules == ["existing", "nearest"]
    ours = OVQForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in OVQForCausalLM.from_pretrained(trained).state_dict().items():
        assert torch.equal(ours[name], weight)


def test_a_path_is_no_style(trained, capsys, tmp_path):
    folder = tmp_path / "a[" / "run]"
    shutil.copytree(trained, folder)
    assert "run]" in run(capsys, "memory", "--config", folder, "--lengths", 64)
    text = tmp_path / "a[" / "text]"
    text.write_text("1 2 3")
    out = run(capsys, "context", "build", "--model", folder, "--text", text, "--out", f"{text}.ctx")
    assert f"{text}.ctx" in out


def test_eval_prints_what_the_library_measures(trained, capsys):
    arguments = ["--model", trained, "--lengths", "24,48", "--num-slots", "4,8"]
    arguments += ["--merge", "nearest,existing", "--examples", 30, "--seed", 1]
    rows = json.loads(run(capsys, "eval", *arguments, "--json"))["rows"]
    expected = evaluate(
        OVQForCausalLM.from_pretrained(trained),
        RunConfig.load(trained).task,
        lengths=[24, 48],
        num_slots=[4, 8],
        merges=["nearest", "existing"],
        num_examples=30,
        seed=1,
        reporter=Seen(),
    )
    assert rows == [dataclasses.asdict(row) for row in expected]
    # The option may also be repeated.
    one_by_one = ["existing" if each == "nearest,existing" else each for each in arguments]
    repeated = json.loads(run(capsys, "eval", "--merge", "nearest", *one_by_one, "--json"))["rows"]
    assert repeated == rows
    scaled = json.loads(run(capsys, "eval", *arguments, "--logn-length", 2, "--json"))["rows"]
    assert {row["logn_length"] for row in scaled} == {2}
    assert [row | {"logn_length": None} for row in scaled] == rows
    assert "log-n" in run(capsys, "eval", *arguments, "--logn-length", 2)
    coarse = json.loads(run(capsys, "eval", *arguments, "--state-dtype", "int8", "--json"))["rows"]
    assert {row["state_dtype"] for row in coarse} == {"int8"}
    assert all(narrow["state_bytes"] < row["state_bytes"] for narrow, row in zip(coarse, rows, strict=True))
    assert "slots in int8" in run(capsys, "eval", *arguments, "--state-dtype", "int8")
    other_seed = json.loads(run(capsys, "eval", *arguments[:-1], 2, "--json"))["rows"]
    assert other_seed != rows
    table = run(capsys, "eval", *arguments)
    for row in rows:
        assert f"{row['accuracy']:.3f}" in table


def test_eval_reads_a_checkpoint_of_a_run(trained, capsys):
    checkpoint = trained / "checkpoint-2"
    out = run(capsys, "eval", "--model", checkpoint, "--lengths", "24", "--examples", 2, "--json")
    assert len(json.loads(out)["rows"]) == 1


def greedy(folder, ids, count):
    model = OVQForCausalLM.from_pretrained(folder).eval()
    for _ in range(count):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-count:]


def test_generate_continues_token_ids(trained, capsys, tmp_path, monkeypatch):
    expected = " ".join(map(str, greedy(trained, [5, 40, 1, 5], 6))) + "\n"
    arguments = ["generate", "--model", trained, "--max-new-tokens", 6]
    assert run(capsys, *arguments, "--prompt", "5 40 1 5") == expected
    (tmp_path / "prompt").write_text("5 40\n1 5\n")
    assert run(capsys, *arguments, "--prompt-file", tmp_path / "prompt") == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("5 40 1 5"))
    assert run(capsys, *arguments, "--prompt-file", "-") == expected


def test_generate_searches_and_samples(trained, capsys, tmp_path):
    arguments = ["generate", "--model", trained, "--prompt", "5 40 1 5", "--max-new-tokens", 8]
    model = OVQForCausalLM.from_pretrained(trained).eval()
    found = model.generate(torch.tensor([[5, 40, 1, 5]]), max_new_tokens=8, num_beams=3, do_sample=False)
    beams = run(capsys, *arguments, "--num-beams", 3)
    assert beams.split() == list(map(str, found[0, 4:].tolist()))
    assert beams != run(capsys, *arguments)
    # As without beams, a penalty is that of the command line alone.
    model.generation_config.repetition_penalty = 5.0
    model.save_pretrained(tmp_path)
    assert run(capsys, *arguments, "--num-beams", 3, "--model", tmp_path) == beams
    sample = [*arguments, "--temperature", 5, "--top-p", 0.9]
    first, again, other = (run(capsys, *sample, "--seed", seed) for seed in (0, 0, 1))
    assert first == again != other
    # So little probability leaves only the most likely token.
    assert run(capsys, *arguments, "--temperature", 5, "--top-p", 1e-6) == run(capsys, *arguments)


def test_generate_with_another_dictionary(capsys, tmp_path):
    # Large weights, so that what is remembered shows in what is said.
    fields = {"vocab_size": 60, "num_slots": 1, "chunk_size": 4, "initializer_range": 1.0}
    tiny_model(mixer_types=["ovq"], **fields).save_pretrained(tmp_path)
    prompt = " ".join(map(str, range(2, 60)))
    arguments = ["generate", "--model", tmp_path, "--prompt", prompt, "--max-new-tokens", 20]
    one = run(capsys, *arguments, "--num-slots", 1)
    assert run(capsys, *arguments) == one != run(capsys, *arguments, "--num-slots", 64)
    by_pairs = run(capsys, *arguments, "--num-slots", 4, "--merge", "nearest")
    assert by_pairs != run(capsys, *arguments, "--num-slots", 4)
    coarse = run(capsys, *arguments, "--num-slots", 4, "--merge", "nearest", "--state-dtype", "int8")
    assert coarse != by_pairs
    model = OVQForCausalLM.from_pretrained(tmp_path, num_slots=4)
    model.set_merge("nearest")
    model.save_pretrained(tmp_path)
    assert run(capsys, *arguments) == by_pairs
    model.set_state_dtype("int8")
    model.save_pretrained(tmp_path)
    assert run(capsys, *arguments) == coarse
    assert run(capsys, *arguments, "--state-dtype", "float32") == by_pairs
    said = fail(capsys, *arguments, "--state-dtype", "int4")
    assert "--state-dtype: expected one of float32, bfloat16, int8, found 'int4'" in said


def test_generate_reads_text_where_there_is_a_tokenizer(capsys, tmp_path):
    words = {word: i for i, word in enumerate(["<unk>", "one", "two", "three", "four"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    tiny_model(1, vocab_size=5, num_hidden_layers=1).save_pretrained(tmp_path)
    names, said = {i: word for word, i in words.items() if i}, greedy(tmp_path, [1, 2], 5)
    assert 0 in said
    expected = [names[i] for i in said if i]
    out = run(capsys, "generate", "--model", tmp_path, "--prompt", "one two", "--max-new-tokens", 5)
    assert out.split() == expected


def test_generate_goes_on_until_a_text_ends(trained, capsys, tmp_path):
    tokens = greedy(trained, [5, 40, 1, 5], 40)
    end = tokens[9]
    model = OVQForCausalLM.from_pretrained(trained)
    model.generation_config.eos_token_id = end
    model.save_pretrained(tmp_path)
    arguments = ["generate", "--model", tmp_path, "--prompt", "5 40 1 5", "--max-new-tokens"]
    ended = list(map(str, tokens[: tokens.index(end) + 1]))
    assert run(capsys, *arguments, 0).split() == ended
    assert run(capsys, *arguments, 40).split() == ended
    assert run(capsys, *arguments, 40, "--ignore-eos").split() == list(map(str, tokens))
    beams = run(capsys, *arguments, 40, "--ignore-eos", "--num-beams", 2)
    assert len(beams.split()) == 40


def test_generate_ends_its_line_after_an_interruption(trained, capsys, monkeypatch):
    def interrupted(*_args, **_kwargs):
        yield 5
        yield 7
        raise KeyboardInterrupt

    monkeypatch.setattr("ovq.hf.streaming.stream_tokens", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", "--model", str(trained), "--prompt", "5", "--max-new-tokens", "0"])
    assert exit_info.value.code == 130
    captured = capsys.readouterr()
    assert captured.out == "5 7\n"
    assert captured.err == "ovq: interrupted\n"


def test_memory_counts_what_the_cache_will_hold(trained, capsys):
    arguments = ["memory", "--config", trained, "--lengths", "10,100"]
    rows = json.loads(run(capsys, *arguments, "--json"))["rows"]
    model = OVQForCausalLM.from_pretrained(trained).eval()
    for row in rows:
        cache = model(torch.ones(1, row["length"], dtype=torch.long), use_cache=True)
        cache = cache.get("cache", cache.get("past_key_values"))
        assert row["state_bytes"] == cache.nbytes
    assert rows[1]["full_attention_bytes"] > 3 * rows[1]["state_bytes"]
    bigger = json.loads(run(capsys, *arguments, "--num-slots", 64, "--json"))["rows"]
    assert bigger[1]["state_bytes"] > rows[1]["state_bytes"]
    assert bigger[1]["full_attention_bytes"] == rows[1]["full_attention_bytes"]
    narrow = json.loads(run(capsys, *arguments, "--state-dtype", "int8", "--json"))["rows"]
    assert narrow[1]["state_bytes"] < rows[1]["state_bytes"]
    assert "KiB" in run(capsys, *arguments)


def test_memory_reads_a_recipe(capsys):
    def state_bytes(recipe):
        return json.loads(run(capsys, "memory", "--config", recipe, "--lengths", 5000, "--json"))["rows"][0]

    full = state_bytes("recall-full")
    assert full["state_bytes"] == full["full_attention_bytes"]
    assert state_bytes("recall-ovq")["full_attention_bytes"] == full["state_bytes"]
    # A model of windows alone is compared with one of full attention alone.
    window = state_bytes("recall-sliding")
    assert window["full_attention_bytes"] > full["state_bytes"] > window["state_bytes"]


@pytest.mark.parametrize("command", ["demo", "train", "eval", "generate", "memory"])
def test_help_shows_an_example(command, capsys):
    out = run(capsys, command, "--help")
    assert f"Example: ovq {command}" in out


def test_the_version_is_printed(capsys):
    assert run(capsys, "--version").startswith("ovq 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tarin", "No such command 'tarin'"),
        ("train", "expected a recipe, or --resume, found neither"),
        ("train recall", "recipe: expected a task (recall, positional, regression, mqar, lm, "),
        ("train recal-ovq", "with - between them, found 'recal-ovq'; did you mean 'recall-ovq'?"),
        ("train lm", "with - between them, found 'lm'; did you mean 'lm-ovq'?"),
        ("train recall-ovq --set train.step=3", "expected one of the fields"),
        ("train recall-ovq --set model.mixer_types=ovk --out {tmp}/x", "ovk"),
        (
            "train recall-ovq --set train.learning_rate=nan --out {tmp}/x",
            "expected a finite number, found nan",
        ),
        (
            "train recall-ovq --set train.learning_rate=inf --out {tmp}/x",
            "expected a finite number, found inf",
        ),
        ("train recall-ovq --out {tmp}/file/run", "--out: expected a folder, found a file"),
        ("train recall-ovq --out {tmp}/file", "--out: expected a folder, found a file"),
        ("reproduce fidelity --out {tmp}/file", "--out: expected a folder, found a file"),
        ("train recall-ovq --out {trained}", "--out: expected a folder without a run"),
        ("train --resume", "--resume: expected the folder of the run in --out, found no --out"),
        ("train recall-ovq --resume --out {trained}", "--resume: expected only --out beside it"),
        ("train --resume --out {tmp}", "expected the folder of a training run"),
        ("train recall-ovq --sett a=b", "No such option"),
        ("eval", "Missing option '--model'"),
        ("eval --model {tmp}", "expected the folder of a saved model, found no config.json in it"),
        ("generate --model you/model --prompt 1", "the folder of a saved model, found no such folder"),
        ("eval --model {trained} --lengths 24,x", "--lengths: expected positive integers"),
        ("eval --model {trained} --lengths 0", "--lengths: expected positive integers"),
        ("eval --model {trained} --lengths 2", "length: expected at least"),
        ("eval --model {trained} --num-slots 4;5", "--num-slots: expected positive integers"),
        ("eval --model {trained} --merge nearest,best", "--merge: expected rules among existing, up"),
        ("eval --model {trained} --examples 0", "--examples"),
        ("generate --model {trained}", "expected one of --prompt and --prompt-file"),
        (
            "generate --model {trained} --prompt-file {tmp}/no",
            "--prompt-file: expected a text file, found none that can be read",
        ),
        ("generate --model {trained} --prompt one", "expected token ids such as '12 7 33'"),
        (
            f"generate --model {{trained}} --prompt {'9' * 5000}",
            "--prompt: expected token ids such as '12 7 33'",
        ),
        ("generate --model {trained} --prompt 9999", "expected token ids from 0 to"),
        (
            "generate --model {trained} --prompt-file {tmp}/file",
            "--prompt-file: expected at least one token, found none",
        ),
        ("context build --model {trained} --text - --out {tmp}/x --merge best", "--merge: expected rules"),
        ("eval harness --model {trained} --tasks x --merge best", "--merge: expected rules among existing"),
        ("memory --config nothing", "--config: expected a folder or a recipe: a task (recall, "),
        ("memory --config {tmp}", "found no config.json in it"),
        ("memory --config recall-full --num-slots 8", "expected a model with 'ovq' layers"),
        ("demo --seed -1", "--seed"),
        ("demo --seed 4294967296", "--seed"),
        ("demo --quick --out {tmp}/file/x", "--out: expected a folder, found a file"),
        ("demo --quick --out {tmp}/file", "--out: expected a folder, found a file"),
    ],
)
def test_bad_input_costs_one_line(arguments, message, capsys, trained, tmp_path):
    (tmp_path / "file").write_text("")
    words = [word.format(tmp=tmp_path, trained=trained) for word in arguments.split()]
    assert message in fail(capsys, *words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prompt-file -", "expected one of --prompt and --prompt-file"),
        ("--top-p 0", "--top-p: expected a number above 0"),
        ("--top-p 0.5", "--top-p: expected a temperature above 0"),
        ("--temperature -1", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--temperature inf", "--temperature: expected a finite number"),
        ("--seed 4294967296", "--seed: expected 0 to 4294967295, found 4294967296"),
        (
            "--num-beams 2 --max-new-tokens 2147483648",
            "--max-new-tokens: expected 0 to 2147483647, found 2147483648",
        ),
        ("--top-k 3", "--top-k: expected a temperature above 0"),
        ("--repetition-penalty 0", "--repetition-penalty: expected from 1e-06 to"),
        ("--repetition-penalty nan", "--repetition-penalty: expected a"),
        ("--min-p 2 --temperature 1", "--min-p: expected a number"),
        ("--num-beams 2 --max-new-tokens 0", "--num-beams: expected"),
        ("--num-slots 0", "--num-slots"),
        ("--merge best", "--merge: expected rules among existing"),
    ],
)
def test_bad_options_of_generate_cost_one_line(options, message, capsys, trained):
    assert message in fail(capsys, "generate", "--model", trained, "--prompt", 1, *options.split())


def test_an_error_of_several_lines_is_joined(monkeypatch, capsys):
    def fail_at_length(_name):
        raise ValueError("expected this,\n  found that")

    monkeypatch.setattr("ovq_lab.train.recipes.get_recipe", fail_at_length)
    assert fail(capsys, "train", "recall-ovq") == "expected this, found that"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: torch.empty(10**15), "expected enough memory, found too little for 4000000000000000 bytes"),
        (lambda: b"0" * 10**18, "expected enough memory, found too little"),
    ],
    ids=["torch", "python"],
)
def test_too_little_memory_is_told_in_one_line(monkeypatch, capsys, error, message):
    monkeypatch.setattr("ovq_lab.train.recipes.get_recipe", lambda _name: error())
    assert fail(capsys, "train", "recall-ovq") == message


def test_errors_can_be_traced(monkeypatch):
    monkeypatch.setenv("OVQ_TRACEBACK", "1")
    with pytest.raises(ValueError, match="--config: expected"):
        main(["memory", "--config", "nothing"])


LOADED = """
import sys
from ovq.cli import main

for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit:
        heavy = {"torch", "transformers", "matplotlib", "numpy", "accelerate"}
        print("loaded:", *sorted(heavy & set(sys.modules)))
"""


def test_help_imports_nothing_heavy():
    lines = ["--help", "train --help", "bench --what speed", "reproduce --list", "memory --config no"]
    process = subprocess.run(
        [sys.executable, "-c", LOADED, *lines], capture_output=True, text=True, check=True
    )
    loaded = [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("loaded:")]
    # Neither does a mistake that needs no measurement to be seen.
    assert loaded[:3] == [[]] * 3
    # A figure's title is known without its evaluations, which need transformers.
    assert not {"transformers", "accelerate"} & {*loaded[3]}
    # The control: the check does see heavy modules.
    assert "torch" in loaded[4]


def test_the_module_runs_as_a_program():
    process = subprocess.run(
        [sys.executable, "-m", "ovq", "train"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert process.stderr.startswith("ovq: error: expected a recipe")


def test_a_terminal_without_a_size_shows_something():
    process = subprocess.run(
        [sys.executable, "-m", "ovq", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "0"},
    )
    assert "generate" in process.stdout


def test_the_demonstration_ends_with_the_next_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("ovq_lab.figures.demo.run_demo", lambda *_, **__: None)
    module = f"{sys.executable} -m ovq"
    for programs, own, program in (
        (["ovq"], ".venv/bin/ovq", "ovq"),
        ([".venv/bin/ovq"], ".venv/bin/ovq", ".venv/bin/ovq"),
        ([], "ovq/__main__.py", module),
    ):
        monkeypatch.setattr("shutil.which", lambda name, of=programs: name if name in of else None)
        monkeypatch.setattr("sys.argv", [own])
        said = run(capsys, "demo", "--out", tmp_path)
        # It is one that there is: its options are read, and only the model is missing.
        command = said.split(f"{program} eval ")[1]
        assert "found no such folder" in fail(capsys, "eval", *command.split())
