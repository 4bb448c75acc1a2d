"""The recommended layer: recipes train with it, and a trained model is asked by another rule."""

import pytest

from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.configuration_ovq import TO_TRAIN
from ovq_lab.train.loop import model_config
from ovq_lab.train.recipes import RECIPES

SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_slots": 6,
}


def test_recipes_train_as_recommended():
    for name, recipe in RECIPES.items():
        if "ovq" in recipe.model.mixer_types:
            config = model_config(recipe)
            assert {field: getattr(config, field) for field in TO_TRAIN} == TO_TRAIN, name


def test_a_model_is_trained_by_one_rule_and_asked_by_another(tmp_path):
    config = OVQConfig.recommended(**SIZES)
    assert (config.num_slots, config.merge, config.growth) == (6, "existing", "plateau")
    assert config.merge_gate
    model = OVQForCausalLM(config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.ask_as_recommended()
    assert (model.config.merge, model.config.growth, model.config.num_slots) == ("nearest", "immediate", 6)
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    with pytest.raises(
        ValueError, match="expected logn_length to be None or an integer of at least 2, found 0"
    ):
        model.ask_as_recommended(logn_length=0)
    model.ask_as_recommended(logn_length=20)
    assert model.config.logn_length == 20
    model.save_pretrained(tmp_path)
    assert OVQForCausalLM.from_pretrained(tmp_path).config.merge == "nearest"


def test_the_recommended_config_is_refused_with_another_rule():
    with pytest.raises(ValueError, match=r"merge: expected 'existing', as is recomm.* found 'nearest'"):
        OVQConfig.recommended(**SIZES, merge="nearest")


def test_the_merge_gate_may_be_left_out():
    config = OVQConfig.recommended(**SIZES, merge_gate=False)
    assert (config.merge_gate, config.merge) == (False, "existing")


def test_a_model_without_slots_cannot_be_asked_so():
    model = OVQForCausalLM(OVQConfig(**SIZES, mixer_types=["sliding_attention"] * 2))
    with pytest.raises(ValueError, match="expected a model with 'ovq' layers"):
        model.ask_as_recommended()
