"""Files of an earlier version load, and go on to what they went on to then.

`tests/saved` was written at commit 2b5a0f7: a model with every mixer there was, what it has read of 30
tokens (as a context, and as the lane of a training run), its logits, and the configuration of a run. What
are `bias` and `rate` of `ablation` now were fields called `slot_bias` and `slot_rate`; every size that may be
left open is.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ovq.convert import MemoryConfig
from ovq.hf import OVQConfig, OVQForCausalLM, build_context, context_info, load_context, save_context
from ovq.hf.cache import CACHE_KEY
from ovq.hf.equal_sizes import equal_sizes
from ovq.layers import OVQAttention
from ovq.ops import ablation, options
from ovq_lab.cli.dictionaries import parse
from ovq_lab.eval.dictionaries import dictionaries_to_test
from ovq_lab.eval.rows import model_label
from ovq_lab.figures.plan import run_name
from ovq_lab.train.carry import load_lanes
from ovq_lab.train.config import RunConfig
from ovq_lab.train.recipes import get_recipe

SAVED = Path(__file__).parent / "saved"
FILES = ("config.json", "run_config.json")
NUM_READ = 30
SMALL = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPECTED = load_file(SAVED / "expected.safetensors")
DELTA = {"delta_head_dim": 6, "delta_value_dim": 3}
IDS, LOGITS = EXPECTED["input_ids"], EXPECTED["logits"]


@pytest.fixture(scope="module")
def model():
    return OVQForCausalLM.from_pretrained(SAVED).eval()


def test_a_model_has_all_its_weights_and_predicts_what_it_did(model):
    assert {name: tuple(t.shape) for name, t in load_file(SAVED / "model.safetensors").items()} == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }
    torch.testing.assert_close(model(IDS).logits, LOGITS)


def test_fields_that_were_renamed_are_read(model):
    assert model.config.ablation == {"bias": "count+norm", "rate": 0.25}
    assert not hasattr(model.config, "slot_rate")
    assert not hasattr(model.config, "rate")
    config = RunConfig.load(SAVED)
    assert (config.model.bias, config.model.rate) == ("count+norm", 0.25)
    assert config == get_recipe("recall-mamba2").override(["model.bias=count+norm", "model.rate=0.25"])


def test_sizes_that_were_open_are_what_they_meant(model):
    sizes = equal_sizes(model.config)
    assert set(sizes) == {"sink_window", "mamba_head_dim", "mamba_state_size"} | DELTA.keys()
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    # What is set as a model is loaded decides what is open.
    config = OVQConfig.from_pretrained(SAVED, num_slots=60)
    assert (config.num_slots, config.sink_window) == (60, equal_sizes(config)["sink_window"])
    assert config.sink_window > model.config.sink_window


def test_keys_of_gated_deltanet_were_as_wide_as_heads(model):
    assert {name: getattr(model.config, name) for name in DELTA} == DELTA
    mixers = {"num_hidden_layers": 1, "mixer_types": ["gated_deltanet"]}
    # Version 0.2 saved the one size, which might be open.
    for size in (None, 42):
        fields = OVQConfig.upgraded(mixers | {"head_dim": 64, "delta_value_dim": size})
        assert (fields["delta_head_dim"], fields["delta_value_dim"]) == (64, size)
    fields = OVQConfig.upgraded(mixers, hidden_size=96, num_attention_heads=3)
    assert (fields["delta_head_dim"], fields["delta_value_dim"]) == (32, 21)


@pytest.mark.parametrize("size", [None, 3])
def test_sizes_that_are_saved_now_stay(tmp_path, size):
    mixers = {"num_hidden_layers": 2, "mixer_types": ["gated_deltanet", "mamba2"]}
    OVQConfig(**mixers, delta_value_dim=size, mamba_state_size=5).save_pretrained(tmp_path)
    loaded = OVQConfig.from_pretrained(tmp_path)
    assert (loaded.delta_value_dim, loaded.mamba_head_dim, loaded.mamba_state_size) == (size, None, 5)


def test_a_field_under_both_its_names_is_refused(tmp_path):
    saved = json.loads((SAVED / "run_config.json").read_text())
    saved["model"]["rate"] = 0.5
    (tmp_path / "run_config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="expected rate alone, found slot_rate, its old name, beside it"):
        RunConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "used"), [("window", 8), ("ovq_sinks", 2), ("exact_rope_dim", 4), ("slot_temperature", True)]
)
def test_an_option_that_was_removed_is_refused_unless_it_is_off(tmp_path, name, used):
    def write(value):
        of_model, of_run = (json.loads((SAVED / file).read_text()) for file in FILES)
        of_run["model"] |= {name: value}
        for file, content in zip(FILES, (of_model | {name: value}, of_run), strict=True):
            (tmp_path / file).write_text(json.dumps(content))

    off = type(used)()
    write(off)
    assert not hasattr(OVQConfig.from_pretrained(tmp_path), name)
    assert RunConfig.load(tmp_path) == RunConfig.load(SAVED)
    assert not hasattr(OVQConfig(**{name: off}), name)
    write(used)
    for read in (
        lambda: OVQConfig.from_pretrained(tmp_path),
        lambda: RunConfig.load(tmp_path),
        lambda: OVQConfig(**{name: used}),
    ):
        with pytest.raises(ValueError, match=f"{name} was removed; expected {off}, found {used}"):
            read()
    with pytest.raises(TypeError, match=name):
        OVQAttention(16, 2, **{name: used})


def test_folders_of_runs_are_called_what_they_were():
    changed = get_recipe("recall-ovq").override(["model.bias=count+norm", "model.rate=0.1"])
    names = [run_name(config) for config in (get_recipe("recall-ovq"), get_recipe("recall-mamba2"), changed)]
    assert names == [
        "recall-ovq-seed0-2a79e17445",
        "recall-mamba2-seed0-960a6dbc5b",
        "recall-ovq-seed0-669af12a82",
    ]


def go_on(model, cache):
    with torch.no_grad():
        return model(IDS[:, NUM_READ:], **{CACHE_KEY: cache}).logits


def test_a_context_goes_on(model):
    assert context_info(SAVED / "context.safetensors").num_tokens == NUM_READ
    context = load_context(SAVED / "context.safetensors", model)
    assert context.num_tokens == NUM_READ
    torch.testing.assert_close(go_on(model, context.cache()), LOGITS[:, NUM_READ:])


def test_a_lane_of_a_training_run_goes_on(model):
    lanes = load_lanes(SAVED / "carried.safetensors", model.config, "cpu")
    assert list(lanes) == [3]
    torch.testing.assert_close(go_on(model, lanes[3]), LOGITS[:, NUM_READ:])


def test_options_of_ablations_are_taken_by_the_names_they_had():
    ablation._warn_of_earlier_name.cache_clear()
    with pytest.warns(FutureWarning, match="bias: expected ablation=.*as it was until version 0.2") as caught:
        layer = OVQAttention(16, 2, bias="count+norm")
    config = OVQConfig(**SMALL, bias="count+norm", ablation={"rate": 0.5}, merge_gate=False)
    assert len(caught) == 1
    ablation._warn_of_earlier_name.cache_clear()
    assert layer.ablation == ablation.Ablation(bias="count+norm")
    assert config.ablation == {"bias": "count+norm", "rate": 0.5}
    # Saved, they are what they were, and nothing is said of it.
    saved = {name: value for name, value in config.to_dict().items() if name != "ablation"}
    assert OVQConfig.from_dict(saved | config.ablation).ablation == config.ablation
    assert OVQConfig.from_dict(saved | {"bias": "count", "rate": "count"}).ablation is None


@pytest.fixture
def in_a_new_process(monkeypatch):
    """Nothing has been said yet of rules of earlier versions."""
    options._warn_of_earlier_rule.cache_clear()
    yield
    options._warn_of_earlier_rule.cache_clear()


@pytest.mark.parametrize("rule", options.COUNT_POWERS)
def test_rules_that_the_reference_alone_has_are_run_by_nearest_with_one_warning(
    tmp_path, rule, in_a_new_process
):
    model = OVQForCausalLM(OVQConfig(**SMALL, merge="nearest", num_slots=6, chunk_size=4)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"merge": rule}))
    message = f"merge: found '{rule}', .*reference.*; 'nearest' runs in its place"
    with pytest.warns(FutureWarning, match=message) as caught:
        loaded = OVQForCausalLM.from_pretrained(tmp_path).eval()
    assert len(caught) == 1
    # Said once, wherever it is found again.
    loaded.set_merge(rule)
    run = get_recipe("recall-ovq").override([f"model.merge={rule}"])
    layers = [x for x in loaded.mixers() if isinstance(x, OVQAttention)]
    found = (loaded.config, OVQConfig.from_pretrained(tmp_path), run.model, *layers)
    assert {each.merge for each in (*found, OVQAttention(16, 2, merge=rule))} == {"nearest"}
    assert loaded.config.growth == "immediate"
    ids = torch.arange(20)[None] % 8
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_was_read_by_such_a_rule_goes_on_by_nearest(tmp_path, in_a_new_process):
    model = OVQForCausalLM(OVQConfig(**SMALL, merge="nearest", num_slots=6, chunk_size=4)).eval()
    ids = torch.arange(20)[None] % 8
    path = tmp_path / "read.safetensors"
    save_context(build_context(model, ids), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["config"]) | {"merge": "ward-sqrt"}
    save_file(load_file(path), path, metadata | {"config": json.dumps(config)})
    with pytest.warns(FutureWarning, match="merge: found 'ward-sqrt'"):
        context = load_context(path, model)
    assert context.num_tokens == 20


def test_rules_that_users_name_so_are_run_by_nearest_too(in_a_new_process):
    with pytest.warns(FutureWarning, match="merge: found 'ward-sqrt'") as caught:
        parsed = parse(None, ["ward-sqrt,existing", "nearest"])
    assert len(caught) == 1
    assert parsed["merges"] == ["nearest", "existing"]
    tested = dictionaries_to_test(OVQConfig(), merges=["ward-sqrt", "nearest"])
    assert [each.merge for each in tested] == ["nearest"]
    # What was measured by them has their names.
    assert model_label("ovq", 64, merge="ward-sqrt") == "OVQ, Ward-sqrt, 64 slots"


def test_converted_models_of_an_earlier_version_merge_by_nearest(in_a_new_process):
    # The rule of their slots was Ward's unless another was asked for.
    now = MemoryConfig.uniform(num_layers=1, num_kv_heads=2, num_slots=8, window=16, chunk_size=8)
    with pytest.warns(FutureWarning, match="merge: found 'ward', .* 'nearest' runs in its place") as caught:
        saved = MemoryConfig.from_dict(now.to_dict() | {"merge": "ward"})
    assert len(caught) == 1
    assert saved == now
