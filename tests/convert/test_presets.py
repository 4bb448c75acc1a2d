"""A preset is what a probe has found, to the bit, and is taken for copies of its model alone."""

import dataclasses
import json
import re

import pytest
import torch

from ovq.convert import MemoryConfig, Option, attach, fitted_bias, probe
from ovq.convert.presets import Preset, find_preset, load_preset, packaged_presets, presets_of, save_preset
from tests.convert.common import KINDS, original, tokens


@pytest.fixture(scope="module")
def found():
    model, texts = original(), [tokens(150), tokens(130, seed=1)]
    options = [Option(num_slots=n, window=w) for n, w in ((0, 8), (8, 8), (16, 8), (0, 40))]
    probed = probe(model, texts, options=options, num_sinks=2, chunk_size=8)
    return fitted_bias(model, texts, probed.config(18))


@pytest.fixture
def folder(found, tmp_path):
    save_preset(Preset.of(original(), found, name="mine", model_name="tiny"), tmp_path / "mine")
    return tmp_path / "mine"


def test_what_was_saved_is_loaded_bit_by_bit(found, folder):
    assert None not in (found.token_use, found.key_exponents, found.slot_bias)
    preset = load_preset(folder)
    assert (preset.config, preset.name, preset.model) == (found, "mine", "tiny")
    # A converted model has found out how far it reads besides; that is its own.
    converted = attach(original(), config=found)
    assert converted.memory_config != found
    again = Preset.of(converted, converted.memory_config, name="mine", model_name="tiny")
    assert again.config == found
    assert torch.equal(again.sample, preset.sample)


def rounded(bits):
    model = original()
    for p in model.parameters():
        groups = p.data.view(-1, 8)
        step = groups.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
        p.data = (groups / step).round().mul(step).view_as(p)
    return model


def test_copies_are_recognised_however_they_are_stored(folder):
    preset = load_preset(folder)
    longer = original()
    longer.resize_token_embeddings(80)
    for copy in (original(), original().to(torch.bfloat16), rounded(4), longer):
        preset.check(copy)


def test_other_models_are_not(folder):
    preset = load_preset(folder)
    shuffled = original()
    torch.manual_seed(1)
    for p in shuffled.parameters():
        p.data = torch.randn_like(p)
    with pytest.raises(ValueError, match="same sizes with other weights"):
        preset.check(shuffled)
    unknown = dataclasses.replace(preset, sample=preset.sample * torch.nan)
    with pytest.raises(ValueError, match=r"other weights \(likeness nan"):
        unknown.check(original())
    for kind in set(KINDS) - {"llama"}:
        with pytest.raises(ValueError, match=f"model_type llama .found {kind}"):
            preset.check(original(kind))
    faster = original()
    faster.config.rope_parameters = {**faster.config.rope_parameters, "rope_theta": 5e5}
    with pytest.raises(ValueError, match="rope"):
        preset.check(faster)


def test_the_nearest_number_of_rows_is_taken(monkeypatch):
    sizes = {
        n: Preset.of(
            original(),
            MemoryConfig.uniform(num_layers=2, num_kv_heads=2, num_slots=n - 36, window=32),
            name=str(n),
            model_name="tiny",
        )
        for n in (100, 104, 200)
    }
    monkeypatch.setattr("ovq.convert.presets.packaged_presets", lambda: tuple(sizes.values()))
    expected = {101: "100", 103: "104", 150: None, 189: None, 195: "200", 210: "200", 211: None}
    for rows, name in expected.items():
        assert getattr(find_preset(original(), rows), "name", None) == name, rows
    assert [p.name for p in presets_of(original())] == ["100", "104", "200"]
    assert presets_of(original("qwen2")) == []


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("preset.json", b"{}", "expected a preset of format 1"),
        ("preset.json", b"{", "expected JSON"),
        ("preset.json", b'{"format": 1}', "preset.json: model: expected a string, found None"),
        ("preset.safetensors", b"", "found damaged files"),
    ],
)
def test_a_damaged_preset_is_refused(folder, file, content, said):
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_preset(folder)


@pytest.mark.parametrize("field", ["identity", "memory", "measured"])
@pytest.mark.parametrize("value", [["model_type"], "llama"], ids=str)
def test_a_field_of_another_kind_is_refused(folder, field, value):
    path = folder / "preset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=rf"{field}: expected an object, found {re.escape(repr(value))}"):
        load_preset(folder)


@pytest.mark.parametrize("preset", packaged_presets(), ids=lambda preset: preset.name)
def test_those_of_the_package_say_what_was_measured(preset):
    assert abs(preset.config.rows_per_head - int(preset.name.rsplit("-", 1)[1])) < 1
    assert None not in (preset.config.token_use, preset.config.key_exponents, preset.config.slot_bias)
    assert {"text", "tokens"} <= set(preset.measured["probe"][0])
    assert preset.measured["environment"]["commit"]
    # What is kept costs nearly nothing.
    assert all(row["converted"] - row["full"] < 0.06 for row in preset.measured["losses"])
    assert len(preset.measured["losses"]) == 6
