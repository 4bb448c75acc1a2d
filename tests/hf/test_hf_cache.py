"""`OVQCache`: transformers' operations on a cache, each against the rows it should stand for."""

import copy

import pytest
import torch

from ovq.hf import OVQCache
from tests.hf.common import BASELINES, left_padded, make_config, make_model, random_ids

IDS = random_ids(3, 19)
CUT = 10


def cached(model):
    cache = OVQCache(model.config)
    with torch.no_grad():
        model(IDS[:, :CUT], past_key_values=cache)
    return cache


def continued(model, cache, rows):
    with torch.no_grad():
        return model(IDS[rows, CUT:], past_key_values=cache).logits


def tensors(cache):
    """Every tensor of a cache that lives on the model's device."""
    for layer in cache.layers:
        yield layer.conv_state
        if layer.memory.kind == "an OVQState":
            yield from (layer.state.key_sum, layer.state.value_sum, layer.state.count)
            yield from (layer.state.pending_keys, layer.state.pending_values)
        else:
            # That of slots stays on the CPU, as with OVQ.
            on_cpu = {"num_seen"} if "slots of KVM" in layer.memory.kind else set()
            yield from (tensor for name, tensor in layer.state.items() if name not in on_cpu)


@pytest.mark.parametrize(
    ("operation", "argument", "rows"),
    [
        ("reorder_cache", torch.tensor([2, 2, 0]), [2, 2, 0]),
        ("batch_select_indices", torch.tensor([2, 0]), [2, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_batch_operations(model, operation, argument, rows):
    cache = cached(model)
    getattr(cache, operation)(argument)
    expected = model(IDS[rows]).logits[:, CUT:]
    torch.testing.assert_close(continued(model, cache, rows), expected)


@pytest.mark.parametrize(
    ("operation", "argument", "expected"),
    [
        ("reorder_cache", torch.tensor([0, 1, 3]), r"indices in 0\.\.2, found \[0, 1, 3\]"),
        ("batch_select_indices", torch.tensor([-1]), r"indices in 0\.\.2, found \[-1\]"),
        ("batch_select_indices", torch.tensor([True, False]), r"mask of shape \(3,\), found \(2,\)"),
        ("batch_repeat_interleave", 0, "repeats: expected an integer of at least 1, found 0"),
    ],
)
def test_rows_that_are_not_there_change_nothing(model, operation, argument, expected):
    cache = cached(model)
    cache.activate_past_recording()
    with torch.no_grad():
        model(IDS[:, CUT : CUT + 2], past_key_values=cache)
    with pytest.raises(ValueError, match=expected):
        getattr(cache, operation)(argument)
    cache.crop(-2)
    expected_logits = model(IDS).logits[:, CUT:]
    torch.testing.assert_close(continued(model, cache, [0, 1, 2]), expected_logits)


@pytest.mark.parametrize("mixer", ["sliding_attention", "full_attention", "ovq"])
@pytest.mark.parametrize("num_new", [1, 5])
def test_a_cache_of_a_model_in_another_dtype_is_refused(mixer, num_new):
    model = make_model(mixer_types=[mixer] * 4)
    for before, after in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        cache = cached(model.to(before))
        with pytest.raises(ValueError, match=rf"expected .*{after}.*, found .*{before}"), torch.no_grad():
            model.to(after)(IDS[:, CUT : CUT + num_new], past_key_values=cache)


def test_reset_forgets_everything_and_the_cache_goes_on(model):
    ids, mask = left_padded([random_ids(1, n)[0] for n in (9, 4)])
    cache = OVQCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    torch.testing.assert_close(model(IDS, past_key_values=cache).logits, model(IDS).logits)


def test_a_copy_is_a_snapshot(model):
    cache = cached(model)
    before = copy.deepcopy(cache)
    first = continued(model, cache, [0, 1, 2])
    assert before.get_seq_length() == CUT
    assert cache.get_seq_length() == IDS.shape[1]
    assert torch.equal(continued(model, before, [0, 1, 2]), first)


def test_lengths_are_those_of_the_tokens_seen(model):
    cache = cached(model)
    for i in range(len(cache)):
        assert cache.get_seq_length(i) == CUT
        assert sum(cache.get_mask_sizes(3, i)) == CUT + 3
        assert not cache.layers[i].is_compileable
        assert not cache.layers[i].is_croppable


def test_offload_and_prefetch_move_every_tensor(model):
    cache = cached(model)
    expected = model(IDS).logits[:, CUT:]
    for i in range(len(cache)):
        cache.offload(i, only_non_sliding=False)
        cache.layers[i].prefetch()
    torch.testing.assert_close(continued(model, cache, [0, 1, 2]), expected)
    # No second device here: "meta" stands for one, since tensors can be moved there, if not back.
    for layer in cache.layers:
        layer.device = torch.device("meta")
        layer.prefetch()
    assert {t.device.type for t in tensors(cache)} == {"meta"}


def test_a_window_does_not_keep_the_prompt_alive():
    layer = cached(make_model()).layers[0]
    assert layer.keys.shape[2] == make_config().sliding_window - 1
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_a_state_of_constant_size_does_not_keep_the_prompt_alive():
    for layer in cached(make_model(**BASELINES)).layers:
        for name, tensor in layer.state.items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("changes", [{"mixer_types": ["ovq"] * 4}, BASELINES], ids=["ovq", "baselines"])
def test_a_layer_with_a_state_keeps_no_keys_and_values(changes):
    layer = OVQCache(make_config(**changes)).layers[1]
    with pytest.raises(NotImplementedError, match="use set_state"):
        layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))


def test_before_the_first_token_operations_do_nothing(model):
    cache = OVQCache(model.config)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    torch.testing.assert_close(model(IDS, past_key_values=cache).logits, model(IDS).logits)


def test_a_call_that_was_interrupted_half_way_is_not_continued(model, monkeypatch):
    cache = cached(model)
    before = cache.snapshot()

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.mixers()[-1], "mix", interrupt)
        with pytest.raises(KeyboardInterrupt):
            continued(model, cache, [0, 1, 2])
    with pytest.raises(ValueError, match=r"whose layers have all read 19 columns, found 10: .*snapshot"):
        continued(model, cache, [0, 1, 2])
    torch.testing.assert_close(continued(model, before, [0, 1, 2]), model(IDS).logits[:, CUT:])
