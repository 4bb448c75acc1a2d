"""Unsupported models and settings are refused before anything is loaded, by name and with a reason."""

import pytest
from vllm.engine.arg_utils import EngineArgs

from ovq.hf import OVQConfig
from ovq.layers import FullAttention
from ovq.layers.registry import MIXERS
from ovq_vllm.checks import check_model

from .conftest import SIZES


def engine_config(folder, **options):
    settings = {"dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True}
    return EngineArgs(model=folder, **settings | options).create_engine_config()


#: A model of this library and a converted one.
KINDS = [{}, {"family": "llama"}]


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_prefixes_are_kept_for_whoever_asks(fields, saved):
    options = {"enable_prefix_caching": True, "mamba_cache_mode": "align"}
    config = engine_config(saved(**fields).folder, **options)
    assert config.cache_config.enable_prefix_caching is True
    assert config.cache_config.mamba_cache_mode == "align"
    if fields:
        assert config.cache_config.block_size == config.cache_config.mamba_block_size == 128
        own = engine_config(saved(**fields).folder, block_size=48, **options)
        assert own.cache_config.block_size == own.cache_config.mamba_block_size == 48
    with pytest.raises(ValueError, match="prefix_match_unit: expected none, found 16"):
        engine_config(saved(**fields).folder, prefix_match_unit=16, **options)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_prefixes_are_not_kept(fields, saved):
    config = engine_config(saved(**fields).folder, enable_prefix_caching=True)
    assert config.cache_config.enable_prefix_caching is False
    assert config.cache_config.mamba_cache_mode == "none"


@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: expected 1, found 2"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1, found 2"),
        ({"enable_lora": True}, "lora_config: expected none"),
        ({"quantization": "fp8"}, "quantization: expected none"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: expected 'auto', found 'fp8'"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative_config: expected none",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_the_engine(options, message, fields, saved):
    with pytest.raises(ValueError, match=message):
        engine_config(saved(**fields).folder, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "weight_dtype: expected none for a trained model, found 'int8'"),
        ({"family": "llama"}, "weight_dtype: expected None, 'auto' or one of .* found 'int7'"),
    ],
    ids=["trained", "converted"],
)
def test_a_format_of_weights(fields, message, saved):
    with pytest.raises(ValueError, match=message):
        engine_config(
            saved(**fields).folder, additional_config={"weight_dtype": "int7" if fields else "int8"}
        )


def test_other_mixers_by_name(saved, monkeypatch):
    monkeypatch.setitem(MIXERS, "mine", type("Mine", (FullAttention,), {}))
    made = saved(mixer_types=["ovq", "mine", "ovq", "sliding_attention"])
    with pytest.raises(ValueError, match=r"found \['mine'\]"):
        engine_config(made.folder)


def test_a_model_without_ovq_layers():
    config = OVQConfig(**SIZES | {"mixer_types": ["full_attention"] * 4})
    with pytest.raises(ValueError, match="at least one layer 'ovq'"):
        check_model(config)


def test_a_weight_that_the_model_does_not_have(saved, engine):
    made = saved()
    # A convolution fewer than were saved.
    with pytest.raises(ValueError, match="expected weights of OVQForCausalLM, found 'model"):
        engine(made.folder, hf_overrides={"conv_size": 0})
