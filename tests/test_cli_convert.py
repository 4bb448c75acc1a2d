"""`ovq convert`, and `ovq generate` and `ovq context` with what it writes."""

import json
import os
import shutil

import pytest
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from ovq.cli import main
from ovq.convert import load
from ovq.text import byte_tokenizer
from tests.convert.common import SIZES, original
from tests.test_cli import fail, run

DOCUMENT = " ".join(str(i * 17 % 64) for i in range(1, 90))
SMALL = ["--num-slots", 8, "--window", 16, "--num-sinks", 2, "--chunk-size", 8]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    original().save_pretrained(folder / "llama")
    return folder


def convert(capsys, folder, *options, out="converted"):
    return run(capsys, "convert", "--model", folder / "llama", "--out", folder / out, *SMALL, *options)


def test_a_converted_model_generates_alone_and_after_a_context(capsys, converted, tmp_path):
    said = convert(capsys, converted)
    assert said.split()[:7] == ["Saved", "a", "model", "that", "keeps", "26", "rows"]
    model, book = converted / "converted", tmp_path / "book.ctx"
    (tmp_path / "book.txt").write_text(DOCUMENT)
    run(capsys, "context", "build", "--model", model, "--text", tmp_path / "book.txt", "--out", book)
    info = json.loads(run(capsys, "context", "info", book, "--json"))
    assert (info["num_tokens"], [layer["num_slots"] for layer in info["layers"]]) == (89, [16, 16])
    assert "16 of 16" in run(capsys, "context", "info", book)
    for options in ([], ["--num-beams", 2]):
        command = ["generate", "--model", model, "--max-new-tokens", 5, *options]
        after = run(capsys, *command, "--context", book, "--prompt", "5 40 1")
        assert after == run(capsys, *command, "--prompt", f"{DOCUMENT} 5 40 1")
    said = fail(capsys, "generate", "--model", model, "--prompt", "1", "--num-slots", 3)
    assert "--num-slots: expected none with a converted model" in said
    assert "expected a folder that does not exist yet" in fail(
        capsys, "convert", "--model", converted / "llama", "--out", model
    )


def test_quiet_hides_what_transformers_loads(capsys, converted, tmp_path, monkeypatch):
    command = ["convert", "--model", converted / "llama", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(transformers.utils.logging, "_tqdm_active", True)
        for options in ([], ["-q"]):
            with pytest.raises(SystemExit):
                main(list(map(str, [*command, "--out", tmp_path / f"out{len(options)}", *options])))
            assert ("Loading weights" in capsys.readouterr().err) == (not options)
    # For what is not imported yet.
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def test_a_probe_shares_out_the_rows(capsys, tmp_path):
    # As many tokens as the tokenizer of bytes has.
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 257})).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("the quick brown fox jumps over the lazy dog " * 3)
    probed = ["--probe", f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}", "--probe-tokens", 130]
    assert "--needle-weight: expected 0 with so few tokens" in fail(
        capsys,
        "convert",
        "--model",
        tmp_path / "llama",
        "--out",
        tmp_path / "c",
        *probed,
        "--probe-tokens",
        90,
    )
    convert(capsys, tmp_path, *probed)
    config = load(tmp_path / "converted").memory_config
    assert 20 < config.rows_per_head <= 26
    assert len({*map(tuple, config.window), *map(tuple, config.num_slots)}) > 1
    # Text in, text out.
    assert run(
        capsys, "generate", "--model", tmp_path / "converted", "--prompt", "the", "--max-new-tokens", 2
    )


def test_what_cannot_be_converted_ends_in_one_line(capsys, converted, tmp_path):
    command = ["convert", "--model", converted / "llama", "--out", tmp_path / "out"]
    assert "window: expected a multiple of chunk_size" in fail(capsys, *command, "--window", 100)
    assert "--dtype: expected auto, float32," in fail(capsys, *command, "--dtype", "x")
    assert "merge: expected one of" in fail(capsys, *command, "--merge", "best")
    (tmp_path / "a.txt").write_text("one")
    assert "expected a model with a tokenizer" in fail(capsys, *command, "--probe", tmp_path / "a.txt")
    assert "No such file" in fail(capsys, *command, "--probe", tmp_path / "b.txt")
    assert not list(tmp_path.glob("*out*"))


def test_an_adaptation_is_saved_and_goes_on_after_an_interruption(capsys, tmp_path, monkeypatch):
    LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 257})).save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    convert(capsys, tmp_path)
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog " * 9)
    command = ["adapt", "--model", tmp_path / "converted", "--dataset", tmp_path / "a.txt", "--held-out", 0]
    sizes = ["--head-tokens", 240, "--logit-tokens", 0, "--length", 80, "--piece-size", 40]
    assert "needle_share: expected 0 with sequences of fewer than 192" in fail(
        capsys, *command, "--out", tmp_path / "whole", *sizes, "--quiet"
    )
    sizes += ["--needle-share", 0]
    run(capsys, *command, "--out", tmp_path / "whole", *sizes)
    whole = load(tmp_path / "whole").memory_config
    assert whole.slot_bias != [[0] * 4] * 2
    assert run(capsys, "generate", "--model", tmp_path / "whole", "--prompt", "a", "--max-new-tokens", 2)

    def interrupt(shown, found):
        raise ValueError("a full disk")

    with monkeypatch.context() as patch:
        patch.setattr("ovq.cli.adapt._Shown.update", interrupt)
        assert "a full disk" in fail(capsys, *command, "--out", tmp_path / "again", *sizes, "--quiet")
    assert not (tmp_path / "again").exists()
    assert "expected no run that has begun" in fail(capsys, *command, "--out", tmp_path / "again", *sizes)
    other = [*sizes, "--seed", 1, "--resume", "--quiet"]
    assert "settings" in fail(capsys, *command, "--out", tmp_path / "again", *other)
    run(capsys, *command, "--out", tmp_path / "again", *sizes, "--resume")
    assert load(tmp_path / "again").memory_config == whole
    assert not list(tmp_path.glob("*.part"))
    for options, said in (
        (["--out", tmp_path / "again"], "expected a folder that does not exist yet"),
        (["--out", tmp_path / "c", "--resume"], "expected the checkpoint of a run, found none"),
        (["--out", tmp_path / "c", "--preset", "tpu"], "--preset: expected one of cpu, gpu"),
        (["--out", tmp_path / "c", "--length", 1], "length: expected an integer of at least 2"),
        (["--out", tmp_path / "c", "--model", tmp_path / "llama"], "a model that ovq convert has written"),
    ):
        assert said in fail(capsys, *command, *options)


@pytest.mark.parametrize(("field", "value"), [("mlp_bias", []), ("eos_token_id", 1e30)])
def test_a_config_with_a_value_of_a_wrong_type_costs_one_line(capsys, converted, tmp_path, field, value):
    shutil.copytree(converted / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    said = fail(capsys, "convert", "--model", tmp_path / "llama", "--out", tmp_path / "out", *SMALL)
    assert said.startswith("--model: expected a causal language model, found")
    assert field in said
