"""Drafts: prompt lookup and assisted decoding give the greedy answer, and `crop` takes tokens out again."""

import gc

import pytest
import torch
import transformers
from packaging.version import Version

from ovq.hf import OVQCache, modeling_ovq
from ovq.hf.cache import CACHE_KEY
from tests.hf.common import BASELINES, left_padded, make_model, random_ids

GREEDY = {"do_sample": False, "max_new_tokens": 20}
# What is repeated is found by prompt lookup.
PROMPT = random_ids(1, 9).repeat(1, 3)


@pytest.fixture
def num_tokens(model):
    """Tokens of each call of the model."""
    found = []
    hook = model.register_forward_hook(
        lambda module, args, kwargs, out: found.append(out.logits.shape[1]), with_kwargs=True
    )
    yield found
    hook.remove()


def answer(model, **options):
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY, **options)


@pytest.fixture(scope="module")
def expected(model):
    """The greedy answer."""
    return answer(model)


def test_prompt_lookup_gives_the_greedy_answer(model, expected, num_tokens):
    assert torch.equal(answer(model, prompt_lookup_num_tokens=6), expected)
    assert max(num_tokens) == 7


@pytest.mark.parametrize(
    ("ids", "is_assisted"), [({}, True), ({"input_ids": PROMPT}, True), ({"input_ids": PROMPT}, False)]
)
def test_embeddings_are_refused(model, ids, is_assisted):
    """The first call reads them without the drafts: beside ids, the answer would not be the greedy one."""
    embeds = model.get_input_embeddings()(PROMPT)
    options = {"assistant_model": make_model(seed=1)} if is_assisted else {"prompt_lookup_num_tokens": 6}
    with pytest.raises(ValueError, match="inputs_embeds: expected None in assisted decoding, or no ids"):
        model.generate(**ids, inputs_embeds=embeds, **options, **GREEDY)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="transformers cannot, before")
def test_prompt_lookup_from_embeddings_drafts_what_was_generated(model, expected):
    embeds = model.get_input_embeddings()(PROMPT)
    found = model.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=6, **GREEDY)
    assert torch.equal(found, expected[:, PROMPT.shape[1] :])


def test_a_model_that_would_draft_by_its_first_layers_stays_as_it_is(model, expected):
    with pytest.raises(
        ValueError, match="assistant_early_exit: expected None, as all layers share a cache, found 1"
    ):
        answer(model, assistant_early_exit=1)
    assert torch.equal(answer(model), expected)


def test_assistants_give_the_greedy_answer(model, expected, num_tokens):
    assert torch.equal(answer(model, assistant_model=make_model(seed=1)), expected)
    assert max(num_tokens) > 1
    # All that an equal assistant says is accepted.
    num_tokens.clear()
    twin = make_model(**BASELINES) if len(model.model.layers) > 4 else make_model()
    twin.generation_config.assistant_confidence_threshold = 0
    twin.generation_config.num_assistant_tokens = 6
    assert torch.equal(answer(model, assistant_model=twin), expected)
    assert len(num_tokens) <= 3


def test_an_assistant_reads_pad_tokens_that_were_drawn():
    """Without a mask transformers would take them for padding, in the middle of what the assistant reads."""
    model, twin = make_model(), make_model()
    expected = answer(model)
    said = expected[0, PROMPT.shape[1] :].tolist()
    pad = next(token for token in said[:6] if token not in PROMPT)
    for each in (model, twin):
        each.generation_config.pad_token_id = pad
        each.generation_config.assistant_confidence_threshold = 0
        each.generation_config.num_assistant_tokens = 6
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(PROMPT, assistant_model=twin, **GREEDY), expected)
    # All drafts are accepted, so the assistant has read what the model has.
    assert len(calls) <= 3


def test_a_cache_that_was_given_goes_on_after_drafts(model, expected):
    cache = OVQCache(model.config)
    options = {"prompt_lookup_num_tokens": 6, CACHE_KEY: cache}
    assert torch.equal(answer(model, **options), expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    further = {"do_sample": False, "max_new_tokens": 9}
    mask = torch.ones_like(expected)
    out = model.generate(expected, attention_mask=mask, **{CACHE_KEY: cache}, **further)
    assert torch.equal(out, model.generate(expected, attention_mask=mask, **further))
    # Which need not be recorded.
    assert not cache.is_recording


# Drafts end with a crop.
@pytest.mark.parametrize(("drafts", "num"), [({}, 3), ({"prompt_lookup_num_tokens": 6}, 1)], ids=str)
def test_a_cache_that_recorded_before_an_answer_goes_on_recording(model, expected, drafts, num):
    cache = OVQCache(model.config)
    cache.activate_past_recording()
    answer(model, **drafts, **{CACHE_KEY: cache})
    with torch.no_grad():
        model(expected[:, -1:], **{CACHE_KEY: cache})
        cache.crop(-num)
        found = model(expected[:, -num:], **{CACHE_KEY: cache}).logits
        torch.testing.assert_close(found, model(expected).logits[:, -num:])


def test_what_a_given_cache_has_read_is_not_read_again(model, expected):
    for num_unread, drafts in (
        (1, {"prompt_lookup_num_tokens": 6}),
        (4, {"prompt_lookup_num_tokens": 6}),
        (4, {"assistant_model": make_model(seed=1)}),
    ):
        cache = OVQCache(model.config)
        model(PROMPT[:, :-num_unread], past_key_values=cache)
        assert torch.equal(answer(model, **drafts, **{CACHE_KEY: cache}), expected)


@pytest.mark.parametrize(
    ("sizes", "most"),
    [([11], 256), ([1] * 7, 7), ([4, 1, 2], 7), ([1] * 8, 7), ([5, 4], 7), ([1] * 15, 7)],
    ids=str,
)
def test_what_is_cropped_was_never_read(model, sizes, most, monkeypatch):
    monkeypatch.setattr(modeling_ovq, "MOST_CROPPED", most)
    monkeypatch.setattr("ovq.hf.cache.MOST_CROPPED", most)
    ids, mask = left_padded([random_ids(1, n, seed=n)[0] for n in (30, 27, 18)])
    with torch.no_grad():
        expected = model(ids, mask).logits
        for start, num in ((0, 1), (0, 7), (12, 0), (12, 5), (13, 1), (13, 7)):
            cache, place = model.make_cache(), start
            if start:
                model(ids[:, :start], mask[:, :start], **{CACHE_KEY: cache})
            cache.activate_past_recording()
            for size in sizes:
                place += size
                model(ids[:, place - size : place], mask[:, :place], **{CACHE_KEY: cache})
            cache.crop(-num)
            left = place - num
            assert cache.get_seq_length() == left
            found = model(ids[:, left : left + 4], mask[:, : left + 4], **{CACHE_KEY: cache}).logits
            torch.testing.assert_close(found, expected[:, left : left + 4])


def test_only_what_was_recorded_can_be_cropped(model):
    cache = model.make_cache()
    model(PROMPT, **{CACHE_KEY: cache})
    with pytest.raises(ValueError, match=r"n from 0 to 0, found crop\(-1\)"):
        cache.crop(-1)
    cache.activate_past_recording()
    model(PROMPT[:, :3], **{CACHE_KEY: cache})
    for num in (-4, 1):
        with pytest.raises(ValueError, match=rf"n from -3 to 0, found crop\({num}\)"):
            cache.crop(num)
    cache.crop(-3)
    with pytest.raises(ValueError, match=r"n from 0 to 0, found crop\(-1\)"):
        cache.crop(-1)
    model(PROMPT[:, :3], **{CACHE_KEY: cache})
    cache.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match=r"n from 0 to 0, found crop\(-1\)"):
        cache.crop(-1)


def test_rows_that_lost_their_padding_are_cropped(model):
    """The state to go back to had padding, and the last of the tokens were read without a mask."""
    cache, ids = model.make_cache(), random_ids(2, 9)
    mask = torch.ones(2, 6)
    mask[1, :2] = 0
    model(ids[:, :6], mask, **{CACHE_KEY: cache})
    cache.batch_select_indices(torch.tensor([0]))
    cache.activate_past_recording()
    model(ids[:1, 6:7], mask.new_ones(1, 7), **{CACHE_KEY: cache})
    model(ids[:1, 7:], **{CACHE_KEY: cache})
    cache.crop(-1)
    assert cache.get_seq_length() == 8
    logits = model(ids[:1, 8:], **{CACHE_KEY: cache}).logits
    torch.testing.assert_close(logits, model(ids[:1]).logits[:, 8:])


@torch.no_grad()
def test_snapshots_are_cropped_each_by_itself(model):
    cache = OVQCache(model.config)
    cache.activate_past_recording()
    model(PROMPT[:, :9], **{CACHE_KEY: cache})
    other = cache.snapshot()
    for one in (cache, other):
        one.crop(-9)
        found = model(PROMPT[:, 9:], **{CACHE_KEY: one}).logits
        torch.testing.assert_close(found, model(PROMPT[:, 9:]).logits)


def test_a_model_that_was_deleted_cannot_read_again_what_stays():
    model = make_model()
    cache = model.make_cache()
    cache.activate_past_recording()
    model(PROMPT[:, :5], **{CACHE_KEY: cache})
    del model
    gc.collect()
    with pytest.raises(ValueError, match=r"crop\(-2\): expected the model that .* it was deleted: keep"):
        cache.crop(-2)
    assert cache.get_seq_length() == 5
    # Nothing is to be read again.
    cache.crop(-5)
    assert cache.get_seq_length() == 0


def test_layers_outputs_are_not_given_where_a_text_is_read_in_two_calls(model):
    cache = model.make_cache()
    cache.activate_past_recording()
    with pytest.raises(ValueError, match=r"output_hidden_states: expected at most 256 .* found 257"):
        model(random_ids(1, 257), output_hidden_states=True, **{CACHE_KEY: cache})
    assert cache.get_seq_length() == 0


def test_tokens_of_a_call_that_fails_were_not_read(model):
    cache, ids = model.make_cache(), random_ids(1, 9)
    cache.activate_past_recording()
    with torch.no_grad():
        model(ids[:, :6], **{CACHE_KEY: cache})
        with pytest.raises(ValueError, match="expected an attention_mask of shape"):
            model(ids[:, 6:], torch.ones(1, 3), **{CACHE_KEY: cache})
        cache.crop(-2)
        found = model(ids[:, 4:6], **{CACHE_KEY: cache}).logits
        torch.testing.assert_close(found, model(ids[:, :6]).logits[:, 4:])


def test_what_was_read_before_others_cannot_be_cropped(model):
    cache = model.make_cache()
    cache.activate_past_recording()
    model(PROMPT[:, :6], **{CACHE_KEY: cache})
    for layer in cache.layers:
        layer.record_past = False
    model(PROMPT[:, 6:9], **{CACHE_KEY: cache})
    with pytest.raises(ValueError, match=r"n from 0 to 0, found crop\(-1\)"):
        cache.crop(-1)


def test_a_long_call_that_fails_goes_on_recording(model, monkeypatch):
    monkeypatch.setattr(modeling_ovq, "MOST_CROPPED", 3)
    cache = model.make_cache()
    cache.activate_past_recording()
    with pytest.raises(ValueError, match="expected no cache together with cu_seqlens"):
        model(PROMPT, cu_seqlens=torch.tensor([0, 5, 27]), **{CACHE_KEY: cache})
    hook = model.model.layers[0].register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(PROMPT, **{CACHE_KEY: cache})
    hook.remove()
    assert cache.is_recording


CHANGES = {
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "shorten": lambda cache: cache.shorten([6, 6]),
    "reset": lambda cache: cache.reset(),
    "join": lambda cache: cache.concatenate([cache, cache.selected([0])]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_recorded_is_of_the_rows_that_there_were(model, change):
    """Going back by it would undo the change as well, if there are as many rows as before."""
    cache, ids = model.make_cache(), random_ids(2, 6)
    with torch.no_grad():
        cache.activate_past_recording()
        model(ids, **{CACHE_KEY: cache})
        made = CHANGES[change](cache)
        cache = made if change == "join" else cache
        with pytest.raises(ValueError, match=r"n from 0 to 0, found crop\(-1\)"):
            cache.crop(-1)
        # After a reset there are none.
        rows, more = cache.num_rows or 2, random_ids(4, 3, seed=1)
        model(more[:rows], **{CACHE_KEY: cache})
        before = cache.snapshot()
        model(more[:rows], **{CACHE_KEY: cache})
        cache.crop(-3)
        found, expected = (model(more[:rows, :1], **{CACHE_KEY: x}).logits for x in (cache, before))
    torch.testing.assert_close(found, expected)
