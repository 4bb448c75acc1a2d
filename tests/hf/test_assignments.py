"""Which token of a text is in which slot of a model: against what is in the cache afterwards."""

import pytest
import torch

from ovq.hf import OVQCache, OVQConfig, OVQForCausalLM, OVQModel, model_assignments
from tests.ops.common import assert_same_state


def model_of(*mixer_types, **changes):
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_attention_heads": 2, "num_slots": 12, "chunk_size": 8}
    config = OVQConfig(num_hidden_layers=len(mixer_types), mixer_types=list(mixer_types), **sizes, **changes)
    torch.manual_seed(0)
    return OVQForCausalLM(config).eval()


@pytest.mark.parametrize("merge", ["existing", "nearest"])
def test_counts_and_means_are_those_of_the_models_state(merge):
    model = model_of("ovq", "sliding_attention", "ovq", merge=merge)
    ids = torch.arange(2 * 70).view(2, 70) * 7 % 40
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[1, :13] = 0
    cache = OVQCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    found = model_assignments(model, ids, attention_mask=mask)
    assert list(found) == [0, 2]
    for layer, assignments in found.items():
        state = cache.layers[layer].state
        assert_same_state(assignments.state, state, tolerance=1e-6)
        slots = assignments.slots
        counts = torch.zeros_like(state.count)
        counts.scatter_add_(2, slots.clamp(min=0), (slots >= 0).long())
        assert torch.equal(counts, state.count)
        assert (slots[1, :, :13] == -1).all()
    assert not torch.equal(found[0].slots, found[2].slots)


def test_a_text_in_two_parts():
    model = model_of("sliding_attention", "ovq", merge="nearest")
    ids = torch.arange(70)[None] * 7 % 40
    whole = model_assignments(model.base_model, ids)[1]
    cache = OVQCache(model.config)
    first = model_assignments(model, ids[:, :45], past_key_values=cache)[1]
    second = model_assignments(model, ids[:, 45:], past_key_values=cache)[1]
    # Where the first part's slots ended tells where its tokens did.
    moved = second.earlier_slots.gather(2, first.slots[..., :40])
    parts = [moved, second.earlier_pending[..., :5], second.slots]
    assert torch.equal(torch.cat(parts, 2), whole.slots)
    assert second.position.tolist() == [list(range(45, 70))]


def test_a_cache_that_records_reads_a_long_text_as_well():
    model, ids = model_of("ovq"), torch.arange(300)[None] * 7 % 40
    cache = OVQCache(model.config)
    cache.activate_past_recording()
    found = model_assignments(model, ids, past_key_values=cache)[0]
    assert torch.equal(found.slots, model_assignments(model, ids)[0].slots)
    # Its last tokens can be taken out again, as after any call.
    cache.crop(-9)
    assert cache.get_seq_length() == 291


def test_a_cache_that_records_costs_no_second_run():
    model, ids, num_calls = model_of("ovq"), torch.arange(60)[None] * 7 % 40, []
    cache = OVQCache(model.config)
    cache.activate_past_recording()
    model.base_model.register_forward_hook(lambda *_: num_calls.append(1))
    found = model_assignments(model, ids, past_key_values=cache)[0]
    assert len(num_calls) == 1
    assert torch.equal(found.slots, model_assignments(model, ids)[0].slots)
    cache.crop(-9)
    assert cache.get_seq_length() == 51


def test_nothing_is_recorded_otherwise():
    model = model_of("ovq")
    layer = model.base_model.mixers()[0]
    ids = torch.arange(20)[None]
    with layer.recording() as outer:
        model(ids)
        with layer.recording() as inner:
            model(ids)
        model(ids)
    model(ids)
    assert (len(outer), len(inner)) == (2, 1)
    with pytest.raises(ValueError, match="input_ids"):
        model_assignments(model, None)
    assert layer._record is None


def test_a_model_without_dictionaries_is_refused():
    config = OVQConfig(
        num_hidden_layers=1, mixer_types=["full_attention"], hidden_size=16, num_attention_heads=2
    )
    with pytest.raises(ValueError, match=r"expected a model with 'ovq' layers, found mixer_types \['full"):
        model_assignments(OVQModel(config), torch.zeros(1, 4, dtype=torch.long))
