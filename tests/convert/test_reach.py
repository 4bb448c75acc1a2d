"""Once a text is longer than the trained length, rows that are far away are read as if they were nearer."""

import dataclasses
import json

import pytest
import torch
from transformers import (
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from ovq.convert import attach, load
from ovq.convert.cache import MemoryLayer
from ovq.convert.config import MemoryConfig
from ovq.convert.reach import Reach
from ovq.convert.rotary import rotary_frequencies
from ovq.hf.cache import CACHE_KEY
from tests.convert.common import KINDS, MEMORY, SIZES, converted, original, tokens

FREQUENCIES = [1.0, 0.3, 0.02]
# Every token has a slot of its own.
ROOMY = {"num_layers": 1, "num_kv_heads": 2, "num_slots": 200, "window": 16, "num_sinks": 3, "chunk_size": 8}


def scaled(kind):
    """A Llama whose rotary positions are scaled."""
    more = {
        "linear": {"factor": 4.0},
        "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "yarn": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
    }[kind]
    rope = {"rope_type": kind, "rope_theta": 100.0, "original_max_position_embeddings": 64, **more}
    return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval()


def partly_turned():
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    return PhiForCausalLM(PhiConfig(**SIZES, rope_parameters=rope)).eval()


MODELS = {kind: lambda kind=kind: original(kind) for kind in KINDS}
MODELS |= {kind: lambda kind=kind: scaled(kind) for kind in ("linear", "llama3", "yarn")}
MODELS |= {"partly": partly_turned}


def keys_at(model, place):
    cache = model.make_cache()
    with torch.no_grad():
        model(torch.tensor([[5]]), position_ids=torch.tensor([[place]]), **{CACHE_KEY: cache})
    return [m.state.pending_keys[:, :, :1] for layer in cache.layers for m in layer.memories]


@pytest.mark.parametrize("name", MODELS)
def test_a_key_that_is_turned_is_that_of_a_later_position(name):
    model = attach(MODELS[name](), **MEMORY)
    reach = model.memory_config.reach
    for early, late in zip(keys_at(model, 3), keys_at(model, 3 + 90), strict=True):
        assert not torch.allclose(early, late, atol=1e-2)
        turned = reach.turned(early, torch.full(early.shape[:3], 90))
        torch.testing.assert_close(turned, late, atol=1e-4, rtol=1e-4)


def expected_positions(num_tokens, reach):
    """Where the tokens of a text are read from, by the rule token by token."""
    places = list(range(num_tokens))
    for now in range(1, num_tokens + 1):
        if reach.is_reposition_due(now):
            places = [max(place, now - reach.limit) if i < now else place for i, place in enumerate(places)]
    return places


def test_when_rows_are_turned():
    reach = Reach(trained_length=50, max_distance=40, frequencies=(1.0,))
    turns = [n for n in range(1, 80) if reach.is_reposition_due(n)]
    # Never more than 50 tokens without a turn, and then every 5; nothing is further away than 40.
    assert turns == [50, 55, 60, 65, 70, 75]
    assert [n + reach.until_reposition(n) for n in (0, 49, 50, 54)] == [50, 50, 55, 55]
    assert Reach(trained_length=53, max_distance=40, frequencies=()).first_reposition == 50
    # A distance beyond the trained length.
    assert Reach(trained_length=48, max_distance=4096, frequencies=()).first_reposition == 512


@pytest.mark.parametrize("exponents", [None, [[[3, -2, 0, 0, 1, 4, -1]] * 2]], ids=["plain", "scaled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@torch.no_grad()
def test_what_is_too_far_away_is_read_from_the_most_distance(dtype, exponents):
    config = MemoryConfig.uniform(
        **ROOMY,
        trained_length=60,
        max_distance=40,
        rotary_frequencies=FREQUENCIES,
        key_exponents=exponents,
    )
    layer, reach, total = MemoryLayer(config.layer(0)), config.reach, 150
    generator = torch.Generator().manual_seed(0)
    raw_q, raw_k = (torch.randn(1, 2, total, 7, generator=generator, dtype=dtype) for _ in range(2))
    v = torch.randn(1, 2, total, 5, generator=generator, dtype=dtype)

    def at(x, places):
        return reach.turned(x, torch.as_tensor(places).expand(x.shape[:3]))

    own = range(total)
    found = layer.attend(at(raw_q, own), at(raw_k, own), v, None)
    for t in (30, 60, 149):
        places = [*expected_positions(t, reach), t]
        assert max(t - place for place in places) == {30: 30, 60: 35, 149: 39}[t]
        scores = at(raw_q, own)[:, :, t : t + 1] @ at(raw_k[:, :, : t + 1], places).transpose(2, 3)
        o = scores.softmax(-1) @ v[:, :, : t + 1]
        torch.testing.assert_close(found[:, :, t : t + 1], o, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_slots_know_the_mean_positions_of_their_tokens():
    model, ids = converted(max_distance=40), tokens(2, 150)
    cache = model.make_cache()
    for num, done in ((44, 44), (106, 150)):
        model(ids[:, done - num : done], **{CACHE_KEY: cache})
        for layer in cache.layers:
            for memory in layer.memories:
                if not memory.budget.num_slots:
                    continue
                first, merged = sum(range(2, 2 + memory.num_merged[0])), memory.state.position_sum.sum(-1)
                if done == 44:
                    assert (merged == first).all()
                    continue
                means = memory.state.position_sum / memory.state.count
                assert means.min() == 150 - 35
                assert means.max() < 150 - memory.budget.window + memory.budget.chunk_size


@torch.no_grad()
def test_what_was_brought_nearer_counts_less_each_time():
    # All that is merged goes to one slot.
    sizes = {**ROOMY, "num_slots": 1, "num_kv_heads": 1, "trained_length": 64, "max_distance": 32}
    config = MemoryConfig.uniform(**sizes, rotary_frequencies=FREQUENCIES)
    layer, generator = MemoryLayer(config.layer(0)), torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 1, 68, dim, generator=generator, dtype=torch.float64) for dim in (7, 5))
    layer.learn(k[:, :, :63], v[:, :, :63])
    memory = layer.memories[0]
    expected = v[:, :, 3:51].mean(2, keepdim=True)
    assert (memory.num_merged, int(memory.state.count)) == ([48], 48)
    torch.testing.assert_close(memory.state.values, expected)
    # Its first turn is after 64 tokens.
    layer.learn(k[:, :, 63:64], v[:, :, 63:64])
    state = memory.state
    assert (memory.num_merged, int(state.count), int(state.position_sum)) == ([48], 42, 42 * (64 - 28))
    torch.testing.assert_close(state.values, expected)


@pytest.mark.parametrize("exponents", [None, [[[3, -2, 0, 0, 1, 4, -1]]]], ids=["plain", "scaled"])
@torch.no_grad()
def test_tokens_are_weighed_as_if_the_text_began_later_and_old_weights_fade(exponents):
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(13, generator=generator, dtype=torch.float64)
    sizes = {**ROOMY, "num_slots": 3, "num_kv_heads": 1, "trained_length": 64, "max_distance": 32}
    learned = {"token_use": [[given.tolist()]], "key_exponents": exponents}
    layer = MemoryLayer(MemoryConfig.uniform(**sizes, rotary_frequencies=FREQUENCIES, **learned).layer(0))
    k, v = (torch.randn(1, 1, 64, dim, generator=generator) for dim in (7, 5))
    layer.learn(k[:, :, :63], v[:, :, :63])
    memory = layer.memories[0]
    weight, values = memory.state.weight.clone(), memory.state.values.clone()
    # Rows are first turned after 64 tokens, those that are further away than 28, and nothing is merged there.
    is_far = memory.state.position_sum < memory.state.count * (64 - 28)
    layer.learn(k[:, :, 63:], v[:, :, 63:])
    assert is_far.any()
    assert torch.equal(memory.state.weight, torch.where(is_far, weight / 2, weight))
    torch.testing.assert_close(memory.state.values, values)
    reach, places = layer.config.reach, torch.arange(68, 80)
    key = torch.randn(12, 7, generator=generator, dtype=torch.float64)
    factor = torch.exp2(torch.tensor(exponents[0][0] if exponents else 0.0))
    found = (reach.turned(key, places) * factor) @ memory.state.token_use[0, 0, :7].double()
    torch.testing.assert_close(
        found, (reach.turned(key, places - 36) * factor) @ given[:7], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(memory.state.token_use[0, 0, 7:], given[7:].float())


@torch.no_grad()
def test_nothing_changes_up_to_the_trained_length(tmp_path):
    model = converted(max_distance=None)
    config = model.memory_config
    assert (config.trained_length, config.max_distance, config.reach.max_distance) == (48, None, 12)
    model.save_pretrained(tmp_path)
    ids = tokens(1, 120)
    found, expected = load(tmp_path)(ids).logits, converted(max_distance=4096)(ids).logits
    assert torch.equal(found[:, :48], expected[:, :48])
    assert (found - expected)[:, 48:].abs().amax(-1).min() > 0


@torch.no_grad()
def test_models_saved_before_there_was_a_reach_get_one(tmp_path):
    model = converted(max_distance=None)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for name in ("trained_length", "max_distance", "rotary_frequencies"):
        del fields["ovq_memory"][name]
    path.write_text(json.dumps(fields))
    assert load(tmp_path).memory_config == model.memory_config


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_the_config_of_a_model_that_turns_keys_otherwise_is_refused(kind):
    config = converted().memory_config
    with pytest.raises(ValueError, match="rotary_frequencies: expected those of this LlamaForCausalLM"):
        attach(scaled(kind), config=config)
    shorter = dataclasses.replace(config, rotary_frequencies=config.rotary_frequencies[:-1])
    with pytest.raises(ValueError, match="rotary_frequencies: expected those"):
        attach(original(), config=shorter)
    anew = dataclasses.replace(config, rotary_frequencies=None)
    assert attach(scaled(kind), config=anew).memory_config.reach != config.reach


def test_keys_are_turned_by_the_angles_that_the_model_turns_them_by():
    """Whatever of a model, a config and a cast rounded the frequencies to 16 bits."""
    exact, rounded = original(), original().bfloat16()
    config, narrow = attach(original(), **MEMORY).memory_config, attach(rounded, **MEMORY).memory_config
    assert narrow.rotary_frequencies != config.rotary_frequencies
    assert attach(exact, config=narrow).memory_config == config
    assert attach(original().bfloat16(), config=config).memory_config == narrow
    assert exact.bfloat16().model.rotary_emb.inv_freq.double().tolist() == config.rotary_frequencies
    assert exact.dtype == torch.bfloat16


def test_models_that_do_not_say_how_they_turn_keys_have_no_limit():
    model = attach(scaled("dynamic"), **{**MEMORY, "max_distance": None})
    assert model.memory_config.reach is None
    with pytest.raises(ValueError, match="max_distance: expected None, found 40: LlamaForCausalLM"):
        attach(scaled("dynamic"), **MEMORY)
    with pytest.raises(ValueError, match="rotary_frequencies: expected those"):
        attach(scaled("dynamic"), config=converted().memory_config)
    # It turns numbers 2 i and 2 i + 1 of a key.
    assert rotary_frequencies(GlmForCausalLM(GlmConfig(**SIZES, pad_token_id=0)).eval()) is None
