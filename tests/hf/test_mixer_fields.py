"""Fields of a config that mixers declare, ours and a user's.

`tests/saved/config_0.2.json` is the config of an OVQ model of version 0.2, with the fields of every mixer.
"""

import json
import re
from pathlib import Path

import pytest
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from ovq.hf import OVQConfig, OVQForCausalLM, build_context, load_context, save_context
from ovq.layers import ConfigField, FullAttention, registry
from ovq.layers.registry import fields_of_mixers
from ovq.plugins import LABORATORY
from ovq_lab.mixers import MIXERS, KVMAttention
from tests.hf.common import SIZES, make_model, random_ids

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "method"
SAVED = json.loads((ROOT / "tests" / "saved" / "config_0.2.json").read_text())
[EXAMPLE] = re.findall(r"```python\n(.*?)```", (DOCS / "add_a_mixer.md").read_text(), flags=re.DOTALL)
# Nearly every model has "ovq" and its fields.
OF_MIXERS = {
    name: mixer
    for mixer, cls in MIXERS.items()
    for name in cls.own_fields().keys() - MIXERS["ovq"].own_fields().keys()
}
NEW = {"delta_head_dim"}
SMALL = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "vocab_size": 8}
KVM = SMALL | {"mixer_types": ["sliding_attention", "kvm"]}


@pytest.fixture(autouse=True)
def _same_mixers():
    """What a test registers is gone after it."""
    before = dict(MIXERS)
    yield
    MIXERS.clear()
    MIXERS.update(before)


@pytest.fixture
def mine():
    """What the example of the documentation makes."""
    names = {}
    exec(EXAMPLE, names)
    return names


def written(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def of_mixers(config):
    return {name: value for name, value in config.to_dict().items() if name in OF_MIXERS}


def test_a_config_has_no_field_of_its_own_that_a_mixer_declares():
    own = OVQConfig.field_defaults()
    assert len(own) < 30
    assert not own.keys() & OF_MIXERS
    assert len(OF_MIXERS) == len(fields_of_mixers(MIXERS)) - 2 == 20


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_config_has_and_saves_the_fields_of_its_own_mixers(mixer, tmp_path):
    config = OVQConfig(**SMALL, mixer_types=[mixer, "ovq"])
    own = {name: f.default for name, f in MIXERS[mixer].own_fields().items() if name in OF_MIXERS}
    assert of_mixers(config) == own
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {*saved} & {*OF_MIXERS} == own.keys()
    for cls in (OVQConfig, AutoConfig):
        assert of_mixers(cls.from_pretrained(tmp_path)) == of_mixers(config)


def test_the_documentation_lists_them():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(.+)` \| (.+) \|$", (DOCS / "mixers.md").read_text(), re.M)
    # That of all attention layers stands once.
    firsts = {name: mixer for mixer, cls in reversed(MIXERS.items()) for name in cls.own_fields()}
    assert rows == [
        (mixer, name, str(field.default), field.doc)
        for mixer, cls in MIXERS.items()
        for name, field in cls.own_fields().items()
        if firsts[name] == mixer
    ]


def test_the_example_of_the_documentation_makes_a_model(mine, tmp_path):
    config = OVQConfig(**SMALL, mixer_types=["sliding_attention", "mine"], my_size=4)
    assert (mine["config"].my_size, config.my_size) == (4, 4)
    assert OVQConfig(**SMALL, mixer_types=["mine", "ovq"]).my_size == 2
    model = OVQForCausalLM(config)
    assert model.mixers()[1].my_size == 4
    model.save_pretrained(tmp_path)
    assert OVQForCausalLM.from_pretrained(tmp_path).mixers()[1].my_size == 4
    assert OVQConfig.from_pretrained(tmp_path, my_size=7).my_size == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"my_size": "4"}, "my_size: expected an integer, found '4'"),
        ({"my_size": True}, "my_size: expected an integer, found True"),
        ({"my_size": 0}, "my_size: expected at least 1, found 0"),
        ({"my_sizes": 4}, "such as 'my_size', found 'my_sizes'"),
        ({"kvm_sink": 4}, "such as 'kvm_sinks', found 'kvm_sink'"),
        ({"kvm_sinks": 4}, r"kvm_sinks: expected 'kvm' among mixer_types .*found \['mine', 'ovq'\]"),
    ],
)
def test_what_a_mixer_cannot_have_is_refused(fields, message, mine, tmp_path):
    with pytest.raises(ValueError, match=message):
        OVQConfig(**SMALL, mixer_types=["mine", "ovq"], **fields)
    if "my_size" in fields:
        saved = OVQConfig(**SMALL, mixer_types=["mine", "ovq"]).to_dict() | fields
        with pytest.raises(ValueError, match=message):
            OVQConfig.from_pretrained(written(tmp_path, saved))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("kvm_sinks", 1.0, "expected an integer, found 1.0"),
        ("kvm_chunk_size", "8", "expected an integer or none, found '8'"),
        ("kvm_growth", None, "expected a text, found None"),
        ("kvm_norm_leak", 1, "expected true or false, found 1"),
    ],
)
def test_a_value_of_another_type_is_refused_wherever_it_is_set(name, value, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        OVQConfig(**KVM, **{name: value})
    config = OVQConfig(**KVM)
    before = config.to_dict()
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        setattr(config, name, value)
    assert config.to_dict() == before


def test_a_field_of_a_mixer_that_is_not_there_may_be_at_its_default():
    config = OVQConfig(**SMALL, kvm_sinks=1, sink_window=1020)
    assert config.to_dict() == OVQConfig(**SMALL).to_dict()
    assert not hasattr(config, "kvm_sinks")


def test_names_that_no_mixer_declares_are_kept_as_transformers_does():
    assert OVQConfig(**KVM, field_of_the_future=3).field_of_the_future == 3


def test_fields_come_and_go_with_the_mixers():
    config = OVQConfig(**SMALL)
    config.mixer_types = ["kvm", "ovq"]
    config.kvm_sinks = 0
    assert (config.kvm_sinks, config.kvm_growth) == (0, "plateau")
    config.mixer_types = ["mamba2", "kvm"]
    assert (config.kvm_sinks, config.mamba_state_size) == (0, 128)
    config.mixer_types = ["ovq", "ovq"]
    assert config.to_dict() == OVQConfig(**SMALL, mixer_types=["ovq", "ovq"]).to_dict()
    with pytest.raises(ValueError, match=r"mixer_types: expected a mixer among .*found 'mamba3'"):
        config.mixer_types = ["mamba3", "ovq"]
    assert config.mixer_types == ["ovq", "ovq"]


@pytest.mark.parametrize("names", [("mixer_types", "sink_window"), ("sink_window", "mixer_types")])
def test_mixers_may_be_set_as_a_model_is_loaded_and_their_fields_in_any_order(names, tmp_path):
    OVQConfig(**KVM, kvm_sinks=0).save_pretrained(tmp_path)
    changes = {"mixer_types": ["sliding_attention", "sink_attention"], "sink_window": 5}
    config = OVQConfig.from_pretrained(tmp_path, **{name: changes[name] for name in names})
    assert of_mixers(config) == {"num_sinks": 4, "sink_window": 5}


@pytest.mark.parametrize("has_laboratory", [True, False])
def test_a_model_of_version_02_is_loaded_without_the_fields_of_mixers_that_it_lacks(
    has_laboratory, monkeypatch, tmp_path
):
    if not has_laboratory:
        monkeypatch.setattr("ovq.plugins.has_laboratory", lambda: False)
        for name in LABORATORY["mixer"]:
            del MIXERS[name]
    # No layer reads them, whatever they are.
    assert SAVED.keys() >= OF_MIXERS.keys() - NEW
    assert (SAVED["mamba_state_size"], SAVED["kvm_sinks"]) == (63, 0)
    config = OVQConfig.from_pretrained(written(tmp_path, SAVED))
    assert config.to_dict() == OVQConfig(**SIZES).to_dict() | {
        name: getattr(config, name) for name in ("_name_or_path", "architectures", "auto_map")
    } | {"dtype": "float32"}
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    kept = {name: value for name, value in SAVED.items() if name not in OF_MIXERS}
    kept |= {"transformers_version": transformers.__version__}
    assert again == kept | {"state_dtype": "float32", "output_gate": False}


@pytest.mark.parametrize("mixer", sorted(set(OF_MIXERS.values())))
def test_a_model_of_version_02_has_the_fields_of_its_mixers(mixer, tmp_path):
    changed = {"raven_slots": 5, "mesa_steps": 7, "vq_decay": 0.5, "num_sinks": 2, "kda_value_dim": 3}
    changed |= {"mixer_types": [mixer] * 4, "kvm_chunk_size": 3, "delta_value_dim": 9}
    saved = SAVED | changed
    config = OVQConfig.from_pretrained(written(tmp_path, saved))
    # What is new is as wide as heads were.
    own = {name: saved.get(name, SAVED["head_dim"]) for name, m in OF_MIXERS.items() if m == mixer}
    assert of_mixers(config) == own


def test_a_context_of_version_02_goes_on(tmp_path):
    model, ids, path = make_model(), random_ids(1, 12), tmp_path / "read.safetensors"
    save_context(build_context(model, ids), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    every = {name: SAVED[name] for name in OF_MIXERS.keys() - NEW} | json.loads(metadata["config"])
    assert len(every) == len(json.loads(metadata["config"])) + 19
    save_file(load_file(path), path, metadata | {"config": json.dumps(every)})
    assert load_context(path, model).num_tokens == 12
    of_kvm = make_model(mixer_types=["kvm", "ovq", "ovq", "ovq"], kvm_chunk_size=3)
    save_context(build_context(of_kvm, ids), path)
    of_kvm.config.kvm_sinks = 0
    with pytest.raises(ValueError, match=r"expected a context made with kvm_sinks=0, .* found kvm_sinks=1"):
        load_context(path, of_kvm)


def declaring(**fields):
    class Declaring(FullAttention):
        config_fields = FullAttention.config_fields | fields

    return Declaring


def test_names_that_are_taken_are_refused():
    registry.register_mixer("greedy", declaring(num_slots=ConfigField(int, 3, "mine")))
    with pytest.raises(ValueError, match=r"mixer_types: .* names that are free, found 'num_slots'"):
        OVQConfig(**SMALL, mixer_types=["greedy", "ovq"])
    # Who does not use it is not concerned.
    assert OVQConfig(**SMALL, field_of_the_future=3).num_slots == 1024
    registry.register_mixer("other", declaring(kvm_sinks=ConfigField(int, 3, "mine")))
    assert OVQConfig(**SMALL, mixer_types=["other", "ovq"]).kvm_sinks == 3
    with pytest.raises(
        ValueError, match=r"mixer_types: kvm_sinks: expected one mixer .* different one of 'kvm'"
    ):
        OVQConfig(**SMALL, mixer_types=["other", "kvm"])
    # One that inherits it declares the same.
    registry.register_mixer("heir", type("Heir", (KVMAttention,), {}))
    assert OVQConfig(**SMALL, mixer_types=["heir", "kvm"], kvm_sinks=0).kvm_sinks == 0


def test_a_default_that_is_a_list_belongs_to_each_config_alone():
    field = ConfigField(list[int], [1], "sizes")
    registry.register_mixer("lists", declaring(my_sizes=field))
    first, second = (OVQConfig(**SMALL, mixer_types=["lists", "ovq"]) for _ in range(2))
    first.my_sizes.append(2)
    assert (first.my_sizes, second.my_sizes, field.default) == ([1, 2], [1], [1])
    with pytest.raises(ValueError, match=r"my_sizes: expected a list, each part an integer, found \['a'\]"):
        OVQConfig(**SMALL, mixer_types=["lists", "ovq"], my_sizes=["a"])


def test_a_default_that_the_field_would_refuse_is_a_mistake():
    with pytest.raises(ValueError, match="default: expected at least 1, found 0"):
        ConfigField(int, 0, "how many", at_least=1)
