"""`ovq convert`, and `ovq generate` and `ovq context` with what it writes."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ovq.cli import main
from ovq.convert import build_context, load, save_context
from ovq.convert.presets import load_preset
from ovq.convert.texts import default_texts
from ovq.ops import cpu_kernels
from ovq_lab.text import byte_tokenizer
from tests.convert import gguf_files
from tests.convert.common import SIZES, original
from tests.convert.gguf_files import write_gguf
from tests.disks import full_disk
from tests.test_cli import fail, run

DOCUMENT = " ".join(str(i * 17 % 64) for i in range(1, 90))
SIZED = ["--num-slots", 8, "--window", 16, "--num-sinks", 2, "--chunk-size", 8]
SMALL = [*SIZED, "--no-probe"]
# As many tokens as the tokenizer of bytes has, and no shorter than the texts.
READING = {**SIZES, "vocab_size": 257, "max_position_embeddings": 160}


@pytest.fixture(autouse=True)
def without_bars(monkeypatch):
    """transformers shows bars as it loads weights, before what is expected to be the only line."""
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    original().save_pretrained(folder / "llama")
    return folder


def convert(capsys, folder, *options, out="converted"):
    return run(capsys, "convert", "--model", folder / "llama", "--out", folder / out, *SMALL, *options)


def test_a_converted_model_generates_alone_and_after_a_context(capsys, converted, tmp_path, monkeypatch):
    said = convert(capsys, converted)
    assert said.split()[:7] == ["Saved", "a", "model", "that", "keeps", "26", "rows"]
    model, book = converted / "converted", tmp_path / "book.ctx"
    (tmp_path / "book.txt").write_text(DOCUMENT)
    run(capsys, "context", "build", "--model", model, "--text", tmp_path / "book.txt", "--out", book)
    info = json.loads(run(capsys, "context", "info", book, "--json"))
    assert (info["num_tokens"], [layer["num_slots"] for layer in info["layers"]]) == (89, [16, 16])
    said = run(capsys, "context", "info", book)
    assert "16 of 16" in said
    counts = [load_file(book)[f"layers.{i}.0.count"] for i in range(2)]
    for layer, count in zip(info["layers"], counts, strict=True):
        shares = count / count.sum(-1, keepdim=True)
        expected = float(torch.special.entr(shares).sum(-1).exp().mean())
        assert layer["effective_slots"] == pytest.approx(expected)
        assert f"{expected:.1f}" in said
    for options in ([], ["--num-beams", 2]):
        command = ["generate", "--model", model, "--max-new-tokens", 5, *options]
        after = run(capsys, *command, "--context", book, "--prompt", "5 40 1")
        assert after == run(capsys, *command, "--prompt", f"{DOCUMENT} 5 40 1")
    command = ["generate", "--model", model, "--prompt", "1", "--max-new-tokens", 5]
    assert run(capsys, *command, "--weight-dtype", "float32") == run(capsys, *command)
    said = fail(capsys, *command, "--weight-dtype", "int2")
    assert "--weight-dtype: expected one of auto, float32, bfloat16, int8, int4, found 'int2'" in said
    with monkeypatch.context() as patch:
        patch.setattr("ovq.cli.loading._device", lambda: "cuda")
        said = fail(capsys, *command, "--weight-dtype", "int8")
        # It asks for nothing, so the model is loaded, and there is no GPU to move it to.
        patch.setattr(torch.nn.Module, "to", lambda model, device: model)
        assert run(capsys, *command, "--weight-dtype", "auto") == run(capsys, *command)
    assert said.startswith("--weight-dtype: expected none with a model on a GPU, found int8")
    said = fail(capsys, "generate", "--model", model, "--prompt", "1", "--num-slots", 3)
    assert "--num-slots: expected none with a converted model" in said
    said = fail(capsys, "generate", "--model", model, "--prompt", "1", "--state-dtype", "int8")
    assert "--state-dtype: expected none with a converted model" in said
    assert "expected a folder that does not exist yet" in fail(
        capsys, "convert", "--model", converted / "llama", "--out", model
    )


@pytest.mark.skipif(not cpu_kernels().startswith("compiled"), reason="there are no kernels on this machine")
def test_a_context_is_read_with_weights_of_other_types(capsys, converted, tmp_path):
    convert(capsys, converted, out="narrow")
    model, book, text = converted / "narrow", tmp_path / "book.ctx", tmp_path / "book.txt"
    text.write_text(DOCUMENT)
    build = ["context", "build", "--model", model, "--text", text, "--out", book]
    run(capsys, *build)
    exact = load_file(book)
    run(capsys, *build, "--weight-dtype", "int8")
    context = build_context(load(model, weight_dtype="int8"), [int(word) for word in DOCUMENT.split()])
    save_context(context, tmp_path / "expected.ctx")
    found, expected = load_file(book), load_file(tmp_path / "expected.ctx")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(found[name], exact[name]) for name in exact)
    command = ["generate", "--model", model, "--max-new-tokens", 5, "--context", book, "--prompt", "5 40 1"]
    # Of either model, which only rounds the weights.
    for options in ([], ["--weight-dtype", "int8"]):
        assert len(run(capsys, *command, *options).split()) == 5


@pytest.mark.parametrize("options", [(), ("--state-dtype", "int8")])
@torch.no_grad()
def test_memory_counts_what_a_converted_model_keeps(capsys, converted, options):
    convert(capsys, converted, *options, out=f"counted{len(options)}")
    folder = converted / f"counted{len(options)}"
    command, model = ["memory", "--config", folder, "--lengths", "5,90", "--json"], load(folder)
    for row in json.loads(run(capsys, *command))["rows"]:
        n = row["length"]
        ids, full = torch.ones(1, n, dtype=torch.int64), original()(torch.ones(1, n, dtype=torch.int64))
        assert row["state_bytes"] == model(ids).past_key_values.nbytes
        cached = [x for layer in full.past_key_values.layers for x in (layer.keys, layer.values)]
        assert row["full_attention_bytes"] == sum(x.nbytes for x in cached)
    said = fail(capsys, *command, "--num-slots", 3)
    assert said == "--num-slots: expected none with a converted model, found 3: convert it again"


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
    bar = [sys.executable, "-c", "from tqdm.auto import tqdm; list(tqdm(range(9)))"]
    assert subprocess.run(bar, capture_output=True, check=True).stderr == b""


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A folder with a Llama that reads text."""
    folder = tmp_path_factory.mktemp("reading")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**READING)).save_pretrained(folder / "llama")
    byte_tokenizer().save_pretrained(folder / "llama")
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("the quick brown fox jumps over the lazy dog " * 3)
    return folder


def probing(folder, *options):
    texts = ["--probe", f"{folder / 'a.txt'},{folder / 'b.txt'}", "--probe-tokens", 130]
    return ["convert", "--model", folder / "llama", *SIZED, *texts, *options]


def test_a_probe_shares_out_the_rows(capsys, reading, tmp_path):
    out = tmp_path / "converted"
    said = fail(capsys, *probing(reading, "--out", out, "--probe-tokens", 90))
    assert "--needle-weight: expected 0 with 90 tokens of text" in said
    assert "--probe: expected none with --no-probe" in fail(
        capsys, *probing(reading, "--out", out, "--no-probe")
    )
    run(capsys, *probing(reading, "--out", out))
    config = load(out).memory_config
    assert 20 < config.rows_per_head <= 26
    assert len({*map(tuple, config.window), *map(tuple, config.num_slots)}) > 1
    # Text in, text out.
    assert run(capsys, "generate", "--model", out, "--prompt", "the", "--max-new-tokens", 2)


def test_a_probe_reads_no_more_tokens_than_its_model_has_positions(capsys, reading, tmp_path):
    (tmp_path / "long.txt").write_text("the quick brown fox " * 20)
    texts = ["--probe", tmp_path / "long.txt", "--probe-tokens", 3072, "--save-preset", tmp_path / "mine"]
    with pytest.raises(SystemExit):
        main(list(map(str, probing(reading, "--out", tmp_path / "out", *texts))))
    assert "Reads 160 tokens of a text, the model's max_position_embeddings" in capsys.readouterr().err
    assert "- long.txt, 160 tokens" in (tmp_path / "mine" / "README.md").read_text()


def test_texts_and_numbers_that_a_probe_cannot_use(capsys, reading, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    texts = ["--probe", f"{reading / 'a.txt'},{tmp_path / 'one.txt'}"]
    for options, expected in (
        (texts, "--probe: expected texts of at least 2 tokens, found 1 in one.txt"),
        (["--needle-weight", "inf"], "--needle-weight: expected a finite number, found inf"),
        (["--num-slots", 5000], "expected fewer rows than the 130 tokens of the longest text"),
    ):
        assert expected in fail(capsys, *probing(reading, "--out", tmp_path / "new", *options))


def test_texts_of_a_probe_may_have_equal_names(capsys, reading, tmp_path):
    (tmp_path / "a.txt").write_text((reading / "b.txt").read_text())
    both = ["--probe", f"{reading / 'a.txt'},{tmp_path / 'a.txt'}"]
    run(capsys, *probing(reading, "--out", tmp_path / "out", *both))
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(reading / "a.txt") in card
    assert str(tmp_path / "a.txt") in card
    none = fail(capsys, *probing(reading, "--out", tmp_path / "new", "--probe", ","))
    assert "--probe: expected text files with commas between them, found ','" in none


def test_a_preset_takes_the_place_of_no_other_files(capsys, reading, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    out = tmp_path / "out"
    for place, expected in (
        (tmp_path, "a folder that does not exist yet"),
        (out, "another folder than that of --out"),
        (out / "preset", "a folder in one that exists"),
    ):
        said = fail(capsys, *probing(reading, "--out", out, "--save-preset", place))
        assert f"--save-preset: expected {expected}, found {place}" in said
    assert (tmp_path / "README.md").read_text() == "mine"


def test_options_that_would_be_ignored_are_refused(capsys, reading, tmp_path):
    command = ["convert", "--model", reading / "llama", "--out", tmp_path / "out"]
    for options, refused, flag in (
        (["--rows", 256, "--num-slots", 256], "--num-slots", "--rows"),
        (["--preset", "mine", "--rows", 256], "--rows", "--preset"),
        (["--preset", "mine", "--merge", "nearest"], "--merge", "--preset"),
        (["--preset", "mine", "--probe", reading / "a.txt"], "--probe", "--preset"),
        (["--no-probe", "--preset", "mine"], "--preset", "--no-probe"),
        (["--no-probe", "--save-preset", tmp_path / "mine"], "--save-preset", "--no-probe"),
        (["--no-probe", "--no-fit-bias"], "--fit-bias", "--no-probe"),
    ):
        said = fail(capsys, *command, *options)
        assert f"{refused}: expected none with {flag}, found one" in said
    assert "expected at least 36, for sinks and the window, found 35" in fail(capsys, *command, "--rows", 35)
    said = fail(capsys, *command, "--rows", 100, "--window", 64)
    assert said == "--window: expected --no-probe beside it and --rows, found none"
    run(capsys, *command, "--rows", 100, "--window", 64, "--preset", "auto", "--no-probe")
    config = load(tmp_path / "out").memory_config
    assert (config.window[0][0], config.num_slots[0][0]) == (64, 32)


def test_what_a_probe_has_found_serves_others_as_a_preset(capsys, reading, tmp_path, monkeypatch):
    run(capsys, *probing(reading, "--out", tmp_path / "probed", "--save-preset", tmp_path / "mine"))
    found = load(tmp_path / "probed").memory_config
    assert "- a.txt, 130 tokens" in (tmp_path / "mine" / "README.md").read_text()
    bare = ["convert", "--model", reading / "llama"]
    run(capsys, *bare, "--out", tmp_path / "given", "--preset", tmp_path / "mine")
    assert load(tmp_path / "given").memory_config == found
    # As if it came with the package: for this model and about so many rows, no probe is needed.
    mine = load_preset(tmp_path / "mine")
    monkeypatch.setattr("ovq.convert.presets.packaged_presets", lambda: (mine,))
    monkeypatch.setattr("ovq.cli.convert.run_probe", lambda *_, **__: pytest.fail("probed"))
    unsized = [*bare, *SIZED[4:]]
    run(capsys, *unsized, "--out", tmp_path / "auto", "--rows", 25, "--save-preset", tmp_path / "again")
    assert load(tmp_path / "auto").memory_config == found
    assert load_preset(tmp_path / "again").config == mine.config
    told = "The presets of this model have 26 rows per head (num_sinks 2, chunk_size 8, merge nearest)"
    for others, is_told in (
        (["--rows", 40], True),
        (["--rows", 26, "--chunk-size", 4], True),
        (["--rows", 26, "--merge", "existing"], True),
        (["--rows", 26, "--preset", "none"], False),
        (["--rows", 26, "--needle-weight", 0], False),
    ):
        with pytest.raises(pytest.fail.Exception, match="probed"):
            main(list(map(str, [*unsized, "--out", tmp_path / "new", *others])))
        assert (told in capsys.readouterr().err) == is_told
    torch.manual_seed(1)
    other = LlamaForCausalLM(LlamaConfig(**READING))
    other.save_pretrained(tmp_path / "other")
    options = ["--preset", tmp_path / "mine", "--out", tmp_path / "new"]
    said = fail(capsys, "convert", "--model", tmp_path / "other", *options)
    assert "other weights" in said
    LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64})).save_pretrained(tmp_path / "larger")
    said = fail(capsys, "convert", "--model", tmp_path / "larger", *options)
    assert "expected a copy of" in said
    assert "hidden_size 32 (found 64)" in said


def test_without_texts_the_probe_reads_those_of_the_package(capsys, reading, tmp_path, monkeypatch):
    short = {name: text[:150] for name, text in default_texts().items()}
    monkeypatch.setattr("ovq.convert.texts.default_texts", lambda: short)
    command = ["convert", "--model", str(reading / "llama"), *map(str, SIZED), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(command)
    said = capsys.readouterr().err.splitlines()
    # What it costs comes before the first step.
    [cost, *steps] = [line for line in said if "robe" in line]
    assert cost.startswith("The probe reads 3 texts, 4")
    assert "about 1 min of one core" in cost
    assert steps[0].startswith("probe, reading: 0/18")
    assert any(line.startswith("probe, reading: 18/18") for line in steps)
    assert "Eisenhower" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_converted_ends_in_one_line(capsys, converted, tmp_path, monkeypatch):
    command = ["convert", "--model", converted / "llama", "--out", tmp_path / "out"]
    assert "window: expected a multiple of chunk_size" in fail(capsys, *command, "--window", 100)
    assert "--dtype: expected one of auto, float32," in fail(capsys, *command, "--dtype", "x")
    assert "merge: expected one of" in fail(capsys, *command, "--merge", "best")
    assert "--state-dtype: expected one of" in fail(capsys, *command, "--state-dtype", "int3")
    nowhere = ["convert", "--model", tmp_path / "no", "--out", tmp_path / "out"]
    assert "--model: expected the folder of a model or a name on the hub, found" in fail(capsys, *nowhere)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("no", "a.txt", "empty"):
        said = fail(capsys, "convert", "--model", name, "--out", "out")
        assert f"--model: expected a causal language model, found '{name}' (" in said
    for options in ([], ["--probe", tmp_path / "a.txt"]):
        assert "expected a model with a tokenizer" in fail(capsys, *command, *options)
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


def test_weights_that_do_not_fit_a_config_are_named(capsys, converted, tmp_path):
    shutil.copytree(converted / "llama", tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 60}))
    said = fail(capsys, "convert", "--model", tmp_path / "llama", "--out", tmp_path / "out", *SMALL)
    assert "lm_head.weight of shape [64, 32] where [60, 32] belongs" in said


def test_a_gguf_file_is_read_as_it_is(capsys, tmp_path):
    file = write_gguf(tmp_path / "tiny.Q4_1.gguf")
    out = tmp_path / "converted"
    said = run(capsys, "convert", "--model", file, "--out", out, *SMALL)
    assert said.splitlines()[1] == f'ovq generate --model {out} --prompt "Once upon a time"'
    model, tokenizer = load(out), AutoTokenizer.from_pretrained(out)
    # The weights are those of the file, in 16 bits.
    assert model.dtype == torch.bfloat16
    reader = gguf.GGUFReader(file)
    [tensor] = [t for t in reader.tensors if t.name == "blk.1.ffn_down.weight"]
    weights = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, weights.bfloat16())
    assert tokenizer.decode(tokenizer("the hat in an inn")["input_ids"]) == "the hat in an inn"
    assert run(capsys, "generate", "--model", out, "--prompt", "the", "--max-new-tokens", 2)
    # Told apart from the folder that it lies in, with the dtype that was asked for.
    named = ["--model", tmp_path, "--gguf-file", file.name, "--dtype", "float32"]
    run(capsys, "convert", *named, "--out", tmp_path / "wide", *SMALL)
    assert torch.equal(load(tmp_path / "wide").model.layers[1].mlp.down_proj.weight, weights)
    missing = fail(capsys, "convert", "--model", tmp_path / "x.gguf", "--out", tmp_path / "o", *SMALL)
    assert "expected a GGUF file, found none in" in missing


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_what_a_gguf_file_needs_is_named(capsys, tmp_path, monkeypatch, package):
    file, find_spec = write_gguf(tmp_path / "tiny.gguf"), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find_spec(name, *rest)
    )
    error = fail(capsys, "convert", "--model", file, "--out", tmp_path / "converted", *SMALL)
    assert f"expected the package {package} for a GGUF file, found none: pip install 'ovq[convert]'" in error


@pytest.mark.parametrize("size", [3, 500, 24_000])
def test_a_gguf_file_that_ends_early_costs_one_line(capsys, tmp_path, size):
    file = write_gguf(tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", "-q", "--model", str(file), "--out", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("ovq: error: --model: expected a causal language model, found")


def scaling(divisors):
    """What llama.cpp writes for Llama 3.1 and later."""
    return lambda writer: writer.add_tensor("rope_freqs.weight", np.asarray(divisors, dtype=np.float32))


def test_the_scaled_rotary_angles_of_llama_3_are_read(capsys, tmp_path):
    sizes = {"rope_theta": 500000.0, "rope_type": "default"}
    scaled = sizes | {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 8192
    plain, expected = (
        LlamaForCausalLM(LlamaConfig(**gguf_files.SIZES, rope_parameters=x)).model.rotary_emb.inv_freq
        for x in (sizes, scaled)
    )
    # One frequency stays, one is divided by less than the factor.
    assert len(set((plain / expected).tolist())) == 3
    file = write_gguf(tmp_path / "tiny.gguf", base=500000.0, more=scaling(plain / expected))
    run(capsys, "convert", "-q", "--model", file, "--out", tmp_path / "out", *SMALL)
    model = load(tmp_path / "out")
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    assert model.config.rope_parameters == scaled


def test_a_factor_of_1_is_none(capsys, tmp_path):
    file = write_gguf(tmp_path / "tiny.gguf", more=lambda writer: writer.add_rope_scaling_factor(1.0))
    run(capsys, "convert", "-q", "--model", file, "--out", tmp_path / "out", *SMALL)


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (lambda writer: writer.add_rope_scaling_factor(4.0), "llama.rope.scaling.factor"),
        (scaling([1, 2, 4, 8]), "expected rotary angles scaled as in Llama 3.1, found [1.0, 2.0, 4.0, 8.0]"),
        (scaling([1, 8]), "expected rotary angles scaled as in Llama 3.1, found [1.0, 8.0]"),
    ],
)
def test_rotary_angles_that_are_scaled_in_another_way_are_refused(capsys, tmp_path, more, found):
    file = write_gguf(tmp_path / "tiny.gguf", more=more)
    with pytest.raises(SystemExit) as exit_info:
        main(["convert", "-q", "--model", str(file), "--out", str(tmp_path / "out"), *SMALL])
    assert exit_info.value.code == 2
    assert found in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16)])
def test_weights_that_16_bits_would_change_stay_as_they_are(capsys, tmp_path, kind, dtype):
    file = write_gguf(tmp_path / "tiny.gguf", kind=kind, has_tokenizer=False)
    said = run(capsys, "convert", "--model", file, "--out", tmp_path / "converted", *SMALL)
    assert '--prompt "12 7 33"' in said
    assert load(tmp_path / "converted").dtype == dtype
    assert not list((tmp_path / "converted").glob("tokenizer*"))


def test_weights_of_16_bits_that_lie_in_float32_are_saved_as_what_they_are(capsys, converted, tmp_path):
    original().to(torch.bfloat16).float().save_pretrained(tmp_path / "llama")
    convert(capsys, tmp_path)
    assert load(tmp_path / "converted").dtype == torch.bfloat16
    convert(capsys, converted, out="of_32_bits")
    assert load(converted / "of_32_bits").dtype == torch.float32


def test_a_damaged_tokenizer_is_an_error_and_not_a_model_without_one(capsys, reading, tmp_path):
    shutil.copytree(reading / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "tokenizer.json").write_text('{"version": "1.0"')
    said = fail(capsys, "convert", "--model", tmp_path / "llama", "--out", tmp_path / "out", *SMALL)
    assert said.startswith("--model: expected a tokenizer that can be read")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_are_as_readable_as_others(capsys, converted, tmp_path, mask):
    before = os.umask(mask)
    try:
        convert(capsys, converted, out=f"with_mask_{mask}")
    finally:
        os.umask(before)
    files = list((converted / f"with_mask_{mask}").iterdir())
    assert {"README.md", "config.json", "model.safetensors"} <= {path.name for path in files}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def test_a_full_disk_costs_one_line_and_leaves_nothing(capsys, converted, tmp_path):
    out = tmp_path / "out"
    words = ["convert", "--model", converted / "llama", "--out", out, *SIZED, "--num-slots", 0]
    with full_disk(2**12), pytest.raises(SystemExit) as exit_info:
        main(list(map(str, words)))
    assert exit_info.value.code == 2
    # Before it comes a line on the missing tokenizer.
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"ovq: error: {out}: cannot be written (")
    assert "File too large" in line
    assert list(tmp_path.iterdir()) == []


def test_slots_are_saved_in_the_format_that_was_asked_for(capsys, converted):
    for options, expected in (([], "float32"), (["--state-dtype", "int8"], "int8")):
        convert(capsys, converted, *options, out=expected)
        assert load(converted / expected).memory_config.state_dtype == expected


def test_code_of_a_folder_is_neither_run_nor_asked_about(capsys, tmp_path, monkeypatch):
    config = {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "own.py").write_text("raise SystemExit")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    message = fail(capsys, "convert", "--model", tmp_path / "own", "--out", tmp_path / "out", "--no-probe")
    assert message.startswith("--model: expected a causal language model")


def test_without_a_probe_it_is_said_what_that_costs(capsys, converted, tmp_path):
    with pytest.raises(SystemExit):
        main(
            ["convert", "--model", str(converted / "llama"), "--out", str(tmp_path / "out"), *map(str, SMALL)]
        )
    assert "warning: --no-probe: all heads are treated alike" in capsys.readouterr().err
    config = load(tmp_path / "out").memory_config
    assert config.num_slots == [[8, 8], [8, 8]]
