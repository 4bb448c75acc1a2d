"""`ovq convert`, and `ovq generate` and `ovq context` with what it writes."""

import json
import os
import shutil

import pytest
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from ovq.cli import main
from ovq.convert import load
from ovq_lab.text import byte_tokenizer
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
    command = ["generate", "--model", model, "--prompt", "1", "--max-new-tokens", 5]
    assert run(capsys, *command, "--weight-dtype", "float32") == run(capsys, *command)
    said = fail(capsys, *command, "--weight-dtype", "int4")
    assert "--weight-dtype: expected one of auto, float32, bfloat16, int8, found 'int4'" in said
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


@pytest.mark.parametrize(("field", "value"), [("mlp_bias", []), ("eos_token_id", 1e30)])
def test_a_config_with_a_value_of_a_wrong_type_costs_one_line(capsys, converted, tmp_path, field, value):
    shutil.copytree(converted / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    said = fail(capsys, "convert", "--model", tmp_path / "llama", "--out", tmp_path / "out", *SMALL)
    assert said.startswith("--model: expected a causal language model, found")
    assert field in said
