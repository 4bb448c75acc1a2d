"""Tokens that do not fit a memory are refused: compiled kernels would write beyond it."""

import copy

import pytest
import torch
from transformers import JetMoeConfig, JetMoeForCausalLM

from ovq.convert import MemoryCache, MemoryConfig, attach
from ovq.convert.cache import MemoryLayer
from ovq.hf.cache import CACHE_KEY
from tests.convert.common import MEMORY, SIZES, original, tokens

UNIFORM = {"num_slots": 8, "window": 16, "num_sinks": 2, "chunk_size": 8}


def model_of(**sizes):
    base = original()
    config = copy.deepcopy(base.config)
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return attach(type(base)(config).eval(), **UNIFORM)


def read(model, rows, cache=None):
    cache = model.make_cache() if cache is None else cache
    model(tokens(rows, 20), **{CACHE_KEY: cache})
    return cache


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(
    ("sizes", "rows", "message"),
    [
        ({}, 2, r"as the cache has, \(1, 8, 8\), found \(2, 8, 8\)"),
        ({"head_dim": 16}, 1, r"as the cache has, \(1, 8, 8\), found \(1, 16, 16\)"),
        ({"num_key_value_heads": 4}, 1, r"\[4, 4\] key/value heads per layer, found one with \[2, 2\]"),
        ({"num_key_value_heads": 1}, 1, r"\[1, 1\] key/value heads per layer, found one with \[2, 2\]"),
        ({"num_hidden_layers": 1}, 1, r"\[2\] key/value heads per layer, found one with \[2, 2\]"),
        ({"num_hidden_layers": 3}, 1, r"\[2, 2, 2\] key/value heads per layer, found one with \[2, 2\]"),
    ],
    ids=str,
)
def test_a_cache_of_other_rows_or_another_model_is_refused(mode, sizes, rows, message):
    cache, other = read(model_of(), 1), model_of(**sizes)
    before = {name: x.clone() for layer in cache.layers for name, x in layer.tensors().items()}
    with mode(), pytest.raises(ValueError, match=message):
        read(other, rows, cache)
    after = {name: x for layer in cache.layers for name, x in layer.tensors().items()}
    assert all(torch.equal(after[name], x) for name, x in before.items())


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}], ids=str)
@torch.no_grad()
def test_an_empty_cache_of_another_model_is_refused(sizes, weight_dtype):
    model = attach(original(), **UNIFORM, weight_dtype=weight_dtype)
    with pytest.raises(ValueError, match=r"expected a cache of this model .* \[2, 2\] key/value heads"):
        read(model, 1, model_of(**sizes).make_cache())


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
@pytest.mark.parametrize("name", ["slot_temperature", "slot_bias"])
@torch.no_grad()
def test_a_cache_of_a_model_with_fewer_query_heads_is_refused(name, weight_dtype):
    sizes = {"num_layers": 2, "num_kv_heads": 2, "num_slots": 8, "window": 16, "chunk_size": 8}
    config = MemoryConfig.uniform(**sizes, **{name: [[1.0] * 2] * 2})
    model = attach(original(), **UNIFORM, weight_dtype=weight_dtype)
    with pytest.raises(
        ValueError, match=f"{name}: expected 4 numbers per layer, one per query head, found 2"
    ):
        read(model, 1, MemoryCache(config))
    with pytest.raises(ValueError, match=f"{name}: expected 4 numbers"):
        attach(original(), config=config, weight_dtype=weight_dtype)


def test_fewer_rows_than_a_cache_has_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match=r"as the cache has, \(2, 8, 8\), found \(1, 8, 8\)"):
        read(model, 1, read(model, 2))


def test_a_model_with_other_heads_than_its_config_says_is_refused():
    """JetMoe's keys are repeated, once per expert, before they reach attention."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    model = JetMoeForCausalLM(JetMoeConfig(**{**SIZES, **sizes})).eval()
    before = model(tokens(1, 10)).logits
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    config = copy.deepcopy(vars(model.config))
    with pytest.raises(ValueError, match="heads, as the config of the memory has, found"):
        attach(model, **UNIFORM)
    assert torch.equal(model(tokens(1, 10)).logits, before)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert vars(model.config) == config


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((1, 4, 3, 8), (1, 3, 3, 8), (1, 3, 3, 8)),
        ((1, 4, 3, 8), (1, 2, 3, 8), (1, 1, 3, 8)),
        ((1, 4, 3, 8), (1, 2, 3, 8), (1, 2, 4, 8)),
        ((1, 3, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)),
        ((2, 4, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)),
        ((1, 4, 3, 4), (1, 2, 3, 8), (1, 2, 3, 8)),
    ],
    ids=str,
)
def test_queries_keys_and_values_must_fit_together(q, k, v):
    layer = MemoryLayer(model_of().memory_config.layer(0))
    with pytest.raises(ValueError, match=r"expected (keys and values|queries)"):
        layer.attend(torch.zeros(q), torch.zeros(k), torch.zeros(v), None)
    if q[:3] == (1, 4, 3) and q[3] == 8:
        with pytest.raises(ValueError, match="expected keys and values"):
            layer.learn(torch.zeros(k), torch.zeros(v))


@torch.no_grad()
def test_keys_and_values_of_different_types_stay_what_they_are():
    """As mixed precision gives them; later calls without it must not take the bytes of one for the other."""
    config = attach(original(), **MEMORY).memory_config.layer(0)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 8, generator=rng) for heads in (4, 2, 2))
    v = v.bfloat16().float()
    layer, plain = MemoryLayer(config), MemoryLayer(config)
    for part in (slice(0, 6), slice(6, 12)):
        values = v[:, :, part].bfloat16() if part.start == 0 else v[:, :, part]
        found = layer.attend(q[:, :, part], k[:, :, part], values, None)
        expected = plain.attend(q[:, :, part], k[:, :, part], v[:, :, part], None)
        torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
