"""Saved, a converted model is the original with one more field in its config."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ovq.convert import ConvertedMixin, MemoryConfig, attach, load
from ovq.convert.card import converted_card
from tests.convert.common import KINDS, converted, original, tokens


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_saved_model_is_loaded_with_its_memory(kind, tmp_path):
    model, ids = converted(kind), tokens(1, 60)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.memory_config == model.memory_config
    also, report = load(tmp_path, output_loading_info=True)
    assert also.memory_config == model.memory_config
    assert not report["missing_keys"]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    # Without this package it is the model that it was.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not isinstance(plain, ConvertedMixin)
    torch.testing.assert_close(plain(ids).logits, original(kind)(ids).logits)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(plain).__name__]


def test_a_model_is_found_where_transformers_finds_it(tmp_path):
    model, ids = converted(), tokens(1, 60)
    model.save_pretrained(tmp_path / "sub")
    assert load(tmp_path, subfolder="sub").memory_config == model.memory_config
    # As the hub's client keeps what it has downloaded.
    cached = tmp_path / "models--me--conv"
    model.save_pretrained(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    again = load("me/conv", cache_dir=tmp_path, local_files_only=True)
    assert again.memory_config == model.memory_config
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(FileNotFoundError, match=r"me/other: expected .*, found no config\.json"):
        load("me/other", cache_dir=tmp_path, local_files_only=True)


SOME_ON_THE_DISK = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), "cpu")
SOME_ON_THE_DISK |= {"model.norm": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}


@pytest.mark.parametrize("places", [SOME_ON_THE_DISK, {"": "disk"}], ids=["some", "all"])
def test_a_model_with_weights_on_the_disk_is_loaded_with_its_memory(places, tmp_path):
    model, ids = converted(), tokens(1, 60)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded")
    assert any(parameter.is_meta for parameter in again.parameters())
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))


def test_what_was_learned_is_saved(tmp_path):
    learned = {"slot_temperature": [[1.5] * 4, [1.0] * 4], "slot_bias": [[0.0] * 4, [-0.5] * 4]}
    config = MemoryConfig.uniform(
        num_layers=2, num_kv_heads=2, num_slots=8, window=16, chunk_size=8, **learned
    )
    model, ids = attach(original(), config=config), tokens(1, 60)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path)(ids).logits, model(ids).logits)
    plain = converted(num_slots=8, window=16, num_sinks=4, max_distance=4096)
    assert (plain(ids).logits - model(ids).logits).abs().max() > 1e-3


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    model = original()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    attach(model, num_slots=8).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    load(tmp_path)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"config\.json describes, found no model\.norm\.weight"):
        load(tmp_path)


def test_weights_of_other_shapes_are_named(tmp_path):
    attach(original(), num_slots=8).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(16)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"found model\.norm\.weight of shape \[16\] where \[32\] belongs"):
        load(tmp_path)


def test_folders_without_a_memory_are_refused(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=r"expected a converted model, found no config\.json"):
            load(folder)
    original().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a converted model, found no ovq_memory"):
        load(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    sizes = {"num_slots": [[8, 8]] * 2, "window": [[8, 8]] * 2, "chunk_size": 8}
    damaged = [
        {"slot_bias": [[0.0]] * 2},
        {"slot_bias": [["a"] * 4] * 2},
        {"slot_temperature": [[1.0] * 3] * 2},
        {"slot_temperature": [[1.0] * 4]},
        {"slot_temperature": [[]] * 2},
        {"rotary_frequencies": "abc", "trained_length": 64},
        {"rotary_frequencies": [float("nan")], "trained_length": 64},
        {"rotary_frequencies": [1.0] * 5, "trained_length": 64},
        {"num_slots": [[], []], "window": [[], []]},
        {"num_slots": [[2**63, 8]] * 2},
        {"value_weight": None},
        {"token_use": False},
        {"key_exponents": {}},
        {"token_use": [{}, {}]},
        {"slot_bias": [[10**400] * 4] * 2},
    ]
    for memory in (
        *(3, {"num_slots": [[1]]}, {"num_slots": 1, "window": 2}, {"window": [[8]], "slots": [[8]]}),
        *(sizes | fields for fields in damaged),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | {"ovq_memory": memory}))
        with pytest.raises(ValueError, match="expected"):
            load(tmp_path)


def test_a_card_links_to_the_hub_and_tells_no_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    local = [str(tmp_path / "org" / "model"), "org/model"]
    cards = [converted_card(converted(), original=x, name="a", how="by hand") for x in (*local, "org/other")]
    for card in cards[:2]:
        assert "\nmodel with a memory of constant size" in card
        assert "base_model" not in card
    assert "\n[org/other](https://huggingface.co/org/other) with a memory" in cards[2]
    assert "\nbase_model: org/other\n" in cards[2]
    assert "\n30 rows of a key and a value on average" in cards[2]
