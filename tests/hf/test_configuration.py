"""The configuration: what it fills in, what it refuses, and that every field is read by the model."""

import functools
import inspect
import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from ovq.hf import OVQConfig, OVQForCausalLM, OVQModel
from ovq.hf.auto_map import AUTO_MAP
from ovq_lab.mixers import MIXERS
from tests.hf.common import BASELINES, SIZES, make_config, random_ids


def test_defaults_alternate_sliding_window_and_ovq_with_rope_on_the_window_only():
    config = OVQConfig(num_hidden_layers=3)
    assert config.mixer_types == ["sliding_attention", "ovq", "sliding_attention"]
    assert config.rope_mixers == ["sliding_attention"]
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.head_dim == config.hidden_size // config.num_attention_heads


VQ = {"mixer_types": ["vq"] * 4}
OTHERS = {"mixer_types": BASELINES["mixer_types"], "num_hidden_layers": BASELINES["num_hidden_layers"]}


@pytest.mark.parametrize("mixer", MIXERS.values())
def test_defaults_are_those_of_the_layers(mixer):
    constructors = [inspect.signature(cls.__init__).parameters for cls in reversed(mixer.__mro__[:-1])]
    arguments = {name: argument for each in constructors for name, argument in each.items()}
    sizes = {"hidden_size", "num_heads", "num_kv_heads", "head_dim"}
    for name in mixer.config_fields.keys() - sizes:
        field = mixer.config_fields[name]
        field = OVQConfig.__dataclass_fields__[field] if isinstance(field, str) else field
        assert arguments[name].default == field.default, name


def test_round_trip_through_json(tmp_path):
    changes = {"growth": "linear", "ablation": {"rate": 0.25}, "rope_mixers": ["ovq"]}
    config = make_config(**changes, pad_token_id=0, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    loaded = OVQConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() | {"auto_map": AUTO_MAP}
    assert all(getattr(loaded, name) == value for name, value in SIZES.items())


def test_fields_of_another_transformers_version_do_not_hinder_loading(tmp_path):
    make_config().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"field_of_the_future": 1}))
    assert OVQConfig.from_pretrained(tmp_path).num_slots == SIZES["num_slots"]


def test_fields_that_other_models_have_are_not_taken_for_misspelt_ones():
    names = ["sep_token_id", "mask_token_id", "num_labels", "max_position_embeddings"]
    assert make_config(**dict.fromkeys(names, 3)).sep_token_id == 3


def test_the_standard_name_of_the_rotary_base(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = make_config(rope_parameters=rope)
    assert make_config(rope_scaling={"type": "default", **rope}).rope_theta == config.rope_theta == 1e6
    assert make_config(rope_parameters={"rope_type": "default"}, rope_theta=5).rope_theta == 5
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["rope_theta"], "rope_parameters" in saved) == (1e6, False)
    assert OVQConfig.from_pretrained(tmp_path).rope_theta == 1e6
    config.rope_parameters = rope | {"rope_theta": 7}
    assert config.rope_theta == 7
    # As files of earlier versions may have them, which read the field alone.
    saved |= {"rope_theta": 10000.0, "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"rope_theta 10000\.0, as beside it, found 1000000\.0"):
        OVQConfig.from_pretrained(tmp_path)
    del saved["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert OVQConfig.from_pretrained(tmp_path).rope_theta == 1e6


def test_fields_of_other_models_may_be_as_ours_are():
    same = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
    make_config(**same, partial_rotary_factor=1.0, layer_types=None, rope_parameters=None)


def test_a_saved_config_loads_without_the_laboratory(tmp_path):
    OVQConfig().save_pretrained(tmp_path)
    code = (
        "import sys; from ovq.hf import OVQConfig; OVQConfig.from_pretrained(sys.argv[1]); "
        "assert 'ovq_lab' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer_types": ["ovq"]}, "one name per layer, num_hidden_layers=4, found 1"),
        (
            {"mixer_types": ["ovq", "ovq", "ovq", "mamba3"]},
            r"mixer_types: expected a mixer among .*full_attention.*ovq.*, found 'mamba3'",
        ),
        ({"rope_mixers": ["rnn"]}, r"rope_mixers: expected a mixer among .* found 'rnn'"),
        ({"num_slots": 0}, "num_slots: expected at least 1, found 0"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, found 0"),
        ({"vocab_size": 0}, "vocab_size: expected at least 1, found 0"),
        ({"sliding_window": 1}, "sliding_window: expected at least 2, found 1"),
        ({**OTHERS, "num_sinks": 0}, "num_sinks: expected at least 1, found 0"),
        ({**OTHERS, "sink_window": 1}, "sink_window: expected at least 2, found 1"),
        ({"rope_mixers": ["linear_attention"]}, r"that have rotary embedding, found \['linear_attention'\]"),
        ({**OTHERS, "mamba_state_size": 0}, "mamba_state_size: expected at least 1, found 0"),
        ({**OTHERS, "mamba_head_dim": 0}, "mamba_head_dim: expected at least 1, found 0"),
        ({**OTHERS, "kda_value_dim": 0}, "kda_value_dim: expected at least 1, found 0"),
        ({**OTHERS, "mesa_steps": 0}, "mesa_steps: expected at least 1, found 0"),
        ({**OTHERS, "delta_value_dim": 0}, "delta_value_dim: expected at least 1, found 0"),
        ({**VQ, "vq_decay": 1.0}, r"vq_decay: expected a number in \[0, 1\), found 1.0"),
        ({**VQ, "commitment_weight": -1}, "commitment_weight: expected at least 0, found -1"),
        ({"growth": "fast"}, "growth: expected one of .* found 'fast'"),
        ({"init": "zeros"}, "init: expected one of .* found 'zeros'"),
        ({"ablation": {"bias": "norm"}}, r"bias: expected one of .* found 'norm'"),
        ({"ablation": {"rate": 2.0}}, r"rate: expected 'count' or a number in \(0, 1\], found 2.0"),
        ({"merge": "all"}, "merge: expected one of .* found 'all'"),
        ({"state_dtype": "int4"}, "state_dtype: expected one of .* found 'int4'"),
        (
            {"merge_gate": True, "ablation": {"rate": 0.5}},
            "merge_gate: expected False with a constant rate, found True",
        ),
        (
            {"mixer_types": ["kvm"] * 4, "kvm_growth": "linear"},
            "kvm_growth: expected one of .* found 'linear'",
        ),
        ({"mixer_types": ["kvm"] * 4, "kvm_chunk_size": 10}, "kvm_chunk_size <= num_slots, found .*=10"),
        ({"mixer_types": ["kvm"] * 4, "kvm_rope_dim": 6}, "kvm_rope_dim: expected an even .*=6, found 6"),
        (
            {"mixer_types": ["raven"] * 4, "raven_top_k": 7},
            "raven_top_k <= raven_slots, found .*=7, raven_slots=6",
        ),
        ({**OTHERS, "raven_head_dim": 0}, "raven_head_dim: expected at least 1, found 0"),
        ({"num_key_value_heads": 3}, "divide num_heads, found num_heads=4, num_kv_heads=3"),
        ({"head_dim": None, "hidden_size": 25}, "hidden_size=25, num_heads=4"),
        ({"head_dim": 5}, "even head_dim .* found 5"),
        ({"conv_size": 1}, "conv_size .* found 1"),
        ({"num_slot": 3}, "such as 'num_slots', found 'num_slot'"),
        ({"mixer_type": ["ovq"]}, "such as 'mixer_types', found 'mixer_type'"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta: expected a finite number above 0, found -1"),
        ({"rope_parameters": {"rope_theta": 5}, "rope_theta": 6}, "rope_theta 6, as beside it, found 5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8}}, "rope_scaling: .*rope_type 'default'"),
        ({"rope_parameters": "linear"}, "rope_parameters: expected .* alone, found 'linear'"),
        ({"rope_parameters": {"ovq": {"rope_theta": 5}}}, "expected .* alone, found {'ovq'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1.0, as the model has, found 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', as the model has, found 'gelu'"),
        ({"attention_bias": True}, "attention_bias: expected False, as the model has, found True"),
        ({"layer_types": ["full_attention"] * 4}, r"layer_types: expected \['sliding_attention', .*found"),
    ],
)
def test_values_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


@pytest.mark.parametrize("changes", [{"num_slots": "9"}, {"hidden_size": 1.5}, {"use_cache": 2}])
def test_values_of_another_type_are_refused(changes):
    with pytest.raises(StrictDataclassFieldValidationError, match=f"{next(iter(changes))}.*expected"):
        make_config(**changes)


def logits_of(**changes):
    torch.manual_seed(0)
    return OVQForCausalLM(make_config(**changes)).eval()(random_ids(2, 40)).logits


@functools.cache
def unchanged(is_baseline):
    return logits_of(**(BASELINES if is_baseline else {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 32},
        {"intermediate_size": 40},
        {"num_hidden_layers": 2, "mixer_types": ["ovq", "ovq"]},
        {"num_attention_heads": 2},
        {"num_key_value_heads": 1},
        {"head_dim": 8},
        {"rms_norm_eps": 1e-2},
        {"rope_theta": 10},
        {"rope_mixers": ["ovq"]},
        {"initializer_range": 0.1},
        {"tie_word_embeddings": True},
        {"mixer_types": ["ovq"] * 4},
        {"sliding_window": 3},
        {"num_slots": 3},
        {"chunk_size": 3},
        {"conv_size": 2},
        {"growth": "linear"},
        {"init": "random"},
        {"merge": "updated"},
        {"ablation": {"bias": "count+norm"}},
        {"ablation": {"rate": 0.2}},
        {"num_sinks": 3},
        {"sink_window": 3},
        {"delta_value_dim": 3},
        {"kda_value_dim": 3},
        {"mesa_steps": 1},
        {"mamba_head_dim": 3},
        {"mamba_state_size": 3},
        {"raven_head_dim": 3},
        {"raven_slots": 5},
        {"raven_top_k": 2},
        {"kvm_chunk_size": 3},
        {"kvm_window_chunks": 3},
        {"kvm_growth": "immediate"},
        {"kvm_sinks": 0},
        {"kvm_rope_dim": 4},
        {"kvm_norm_leak": False},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_changes_the_model(changes):
    name = next(iter(changes))
    is_baseline = name not in OVQConfig.__annotations__
    found = logits_of(**(BASELINES if is_baseline else {}) | changes)
    assert not torch.allclose(found, unchanged(is_baseline), atol=1e-4)


@pytest.mark.parametrize("load", [OVQConfig, OVQModel, OVQForCausalLM])
def test_models_of_another_type_are_refused(tmp_path, load):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the config of a model of type 'ovq', found 'llama'"):
        load.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields", [{"num_slots": "many"}, {"mixer_types": [1]}, {"conv_size": None}], ids=str
)
def test_a_saved_field_of_a_wrong_type_is_a_value_error_that_names_it(tmp_path, fields):
    OVQConfig().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | fields))
    [name] = fields
    with pytest.raises(ValueError, match=f"expected fields of the types of OVQConfig.*'{name}'"):
        OVQConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["rms_norm_eps", "rope_theta", "initializer_range", "vq_decay", "commitment_weight"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_numbers_that_are_none_or_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        make_config(**VQ, **{name: value})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 2}, "mixer_types: expected one name per layer, num_hidden_layers=2, found 4"),
        ({"num_hidden_layers": 6}, "mixer_types: expected one name per layer, num_hidden_layers=6, found 4"),
        ({"sliding_window": 1}, "sliding_window: expected at least 2, found 1"),
    ],
)
def test_fields_that_were_set_are_checked_before_a_model_is_made(tmp_path, fields, expected):
    """The model could be trained and saved, but never loaded."""
    config = make_config(num_hidden_layers=4)
    OVQForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=expected):
        OVQForCausalLM.from_pretrained(tmp_path, **fields)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=expected):
        OVQModel(config)


@pytest.mark.parametrize("make", [OVQModel, OVQForCausalLM])
def test_models_made_from_one_config_change_each_by_itself(make):
    config = make_config()
    before, model, other = config.to_dict(), make(config), make(config)
    model.set_num_slots(20)
    # Of a model and its backbone, each may be told.
    model.base_model.ask_as_recommended(logn_length=256)
    assert (model.config.merge, model.base_model.config.num_slots) == ("nearest", 20)
    assert config.to_dict() == other.config.to_dict() == before
