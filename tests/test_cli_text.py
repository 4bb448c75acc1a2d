"""A language model from a folder of text to the text it writes, all of it on the command line."""

import json
import shlex
import shutil

import pytest

from ovq.cli import main
from ovq.hf import load_context
from ovq_lab.train.config import RunConfig
from tests.test_cli import fail, run
from tests.train.text_common import write_texts

SETTINGS = (
    "train.steps=2 train.batch_size=2 train.lengths=32 train.warmup_steps=1 model.hidden_size=16 "
    "model.intermediate_size=16 model.num_attention_heads=2 model.num_slots=4 model.chunk_size=8 "
    "model.sliding_window=8 task.held_out=0"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return write_texts(tmp_path, monkeypatch)


def train_words(folder, out):
    settings = [f"task.dataset={folder}", *SETTINGS.split()]
    return ["train", "lm-ovq", *(word for each in settings for word in ("--set", each)), "--out", str(out)]


def test_a_model_of_text_reads_and_writes_text(folder, tmp_path, capsys):
    out = run(capsys, *train_words(folder, tmp_path / "run"))
    assert f"ovq eval lm --model {tmp_path / 'run'}" in out
    assert RunConfig.load(tmp_path / "run").task.dataset == str(folder)
    written = run(capsys, "generate", "--model", tmp_path / "run", "--prompt", "né", "--max-new-tokens", 5)
    assert len(written) > 1
    book = tmp_path / "book.txt"
    book.write_text("né" * 50)
    words = ["context", "build", "--model", tmp_path / "run", "--text", book, "--out", tmp_path / "book.ctx"]
    assert "what the model remembers of 150 tokens" in run(capsys, *words)
    from ovq.cli.loading import load_model

    assert load_context(tmp_path / "book.ctx", load_model(tmp_path / "run")).num_tokens == 150


@pytest.mark.parametrize(
    ("held_out", "repeats", "said", "lengths"),
    [
        # "a.txt" and, if more are held out, "k.txt" are for the test.
        (0.1, 1, "documents: 10 for train, 1 for validation, 1 for test", [3]),
        (0.3, 700, "documents: 8 for train, 2 for validation, 2 for test", [4096]),
        (0.3, 12000, "documents: 8 for train, 2 for validation, 2 for test", [4096, 65536]),
        (
            0,
            1,
            "warning: no document is left to test the model on (12 for train, 0 for validation, 0 for test); "
            "a larger task.held_out than 0 leaves some",
            None,
        ),
    ],
)
def test_the_test_that_training_prints_finds_text(folder, tmp_path, capsys, held_out, repeats, said, lengths):
    (folder / "k.txt").write_text("lorem " * repeats)
    words = [*train_words(folder, tmp_path / "run"), "--set", f"task.held_out={held_out}"]
    with pytest.raises(SystemExit):
        main(words)
    out, err = capsys.readouterr()
    assert f"{folder}: {said}" in err.splitlines()
    ovq, *printed = shlex.split(out.partition("Test it: ")[2])
    assert ovq == "ovq"
    if lengths is None:
        assert printed[4:8] == ["--dataset", "FILE", "--split", "all"]
        assert "(held_out=0.0); train on more documents, or with another task.held_out" in fail(
            capsys, *printed[:4]
        )
        return
    rows = json.loads(run(capsys, *printed, "--windows", 1, "--json"))["rows"]
    assert [row["length"] for row in rows if row["merge"] == "existing"] == lengths


def test_documents_that_were_trained_on_are_not_called_held_out(folder, tmp_path, capsys):
    """Also in another folder, by another share, after further training, and by a name of their own."""
    first, second, other = tmp_path / "run", tmp_path / "second", tmp_path / "other"
    run(capsys, *train_words(folder, first), "--set", "task.held_out=0.3")
    other.mkdir()
    (other / "new.txt").write_text("of neither run " * 30)
    run(capsys, *train_words(other, second), "--init-from", first)
    (other / "renamed.txt").write_text((folder / "b.txt").read_text())

    def counts(model, *options):
        with pytest.raises(SystemExit):
            main(["eval", *map(str, options), "--model", str(model), "--json"])
        out, err = capsys.readouterr()
        found = json.loads(out)
        [number], total = found["num_trained_on"], found["num_documents"]
        warning = f"warning: {model} was trained on {number} of these {total} documents: not held out"
        assert (warning in err.splitlines()) == bool(number)
        return number, total

    read = ["lm", "--lengths", 3, "--windows", 1]
    assert counts(first, *read) == (0, 2)
    assert counts(first, *read, "--split", "validation", "--held-out", 0.6) == (1, 3)
    assert counts(first, *read, "--split", "all", "--join-to", 50) == (8, 12)
    elsewhere = ["--dataset", other, "--split", "all"]
    assert counts(first, *read, *elsewhere) == (1, 2)
    assert counts(second, *read, *elsewhere) == (2, 2)
    needles = ["needle", "--haystack", "essay", "--lengths", 500, "--examples", 1, "--distractors", 1]
    assert counts(first, *needles, *elsewhere) == (1, 2)
    words = ["--model", first, "--windows", 1, "--lengths", 3]
    assert "all, not held out" in " ".join(run(capsys, "eval", "lm", *words, "--split", "all").split())
    step = shutil.copytree(first, first / "checkpoint-1", ignore=shutil.ignore_patterns("corpus.json"))
    assert counts(step, *read, "--split", "all") == (8, 12)
    # Runs of earlier versions say nothing of their documents.
    about = json.loads((first / "corpus.json").read_text())
    del about["trained_on"]
    (first / "corpus.json").write_text(json.dumps(about))
    assert counts(first, *read, "--split", "all") == (None, 12)
    run(capsys, *train_words(other, tmp_path / "third"), "--init-from", first)
    assert counts(tmp_path / "third", *read, *elsewhere) == (None, 2)


def test_the_memory_of_a_recipe_on_text_is_known_without_its_corpus(capsys):
    assert "2.3 MiB" in run(capsys, "memory", "--config", "lm-ovq", "--lengths", 65536)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("task.dataset={tmp}/nowhere", "dataset: expected a file or folder, found nothing at "),
        ("task.dataset={tmp}", "expected .txt, .jsonl, .parquet files, found none"),
        ("task.tokenizer=bpe:7", "tokenizer: expected bpe:N with N of at least 257"),
        ("task.tokenizer={tmp}", "tokenizer: expected bytes, bpe:N, the folder of a saved tokenizer"),
        ("task.held_out=0.9999", "expected documents for train"),
        ("train.lengths=1000000", "train.lengths: expected at most"),
        ("task.carry_state=true", "task.carry_state: expected train.micro_batches=1"),
    ],
)
def test_bad_input_costs_one_line(folder, tmp_path, capsys, setting, message):
    (tmp_path / "empty").mkdir()
    words = [*train_words(folder, tmp_path / "run"), "--set", setting.format(tmp=tmp_path / "empty")]
    assert message in fail(capsys, *words, "--set", "train.micro_batches=2")
