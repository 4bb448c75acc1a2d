"""Folders of converted models are detected and run with their memory; no others are."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM

from ovq.convert.config import CONFIG_KEY
from ovq_vllm.detect import CONVERTED, detect_converted

from .conftest import CONVERTED as FAMILIES
from .test_refused import engine_config


@pytest.fixture
def folder(saved):
    return saved(family="llama").folder


@pytest.mark.parametrize("family", FAMILIES)
def test_by_its_config(family, saved):
    assert engine_config(saved(family=family).folder).model_config.architecture == CONVERTED


def test_though_it_names_no_architecture_or_vllm_loads_its_plugins_twice(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    fields = json.loads((copied / "config.json").read_text())
    del fields["architectures"]
    (copied / "config.json").write_text(json.dumps(fields))
    detect_converted()
    assert engine_config(str(copied)).model_config.architecture == CONVERTED


def test_the_same_model_without_a_memory_is_left_to_vllm(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    delattr(model.config, CONFIG_KEY)
    model.save_pretrained(tmp_path)
    assert engine_config(str(tmp_path)).model_config.architecture == "LlamaForCausalLM"


def test_never_by_the_classes_of_transformers(folder):
    # They would run it with full attention.
    with pytest.raises(ValueError, match=f"'{CONVERTED}' is not a registered model in the Transformers"):
        engine_config(folder, model_impl="transformers")


def test_a_damaged_memory(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    fields = json.loads((copied / "config.json").read_text())
    fields[CONFIG_KEY]["chunk_size"] = 0
    (copied / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="chunk_size: expected an integer of at least 1, found 0"):
        engine_config(str(copied))
