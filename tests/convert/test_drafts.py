"""Drafts with converted models: what `crop` takes out was never merged, and answers are the greedy ones."""

import dataclasses
import itertools
import sys

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

import ovq.convert.cache
from ovq.byte_tokens import byte_tokenizer, byte_vocabulary, wrapped
from ovq.convert import attach
from ovq.convert.step import _are_drafts
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.cache import CACHE_KEY
from tests.convert.common import IDS, MEMORY, SIZES, converted, original, tokens
from tests.hf.common import make_model

ATTACH = sys.modules[attach.__module__]
GREEDY = {"do_sample": False, "max_new_tokens": 40}
PROMPT = tokens(1, 25, seed=3).repeat(1, 2)


@pytest.fixture(scope="module")
def model():
    """In float64, so that rounding flips no choice; heads merge and drop, and rows are re-positioned."""
    model = converted().double()
    model.generation_config.eos_token_id = None
    return model


def answer(model, **options):
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY, **options)


@pytest.fixture(scope="module")
def expected(model):
    """The answer without drafts."""
    return answer(model)


@pytest.mark.parametrize("most", [256, 10])
def test_prompt_lookup_gives_the_greedy_answer(model, expected, most, monkeypatch):
    monkeypatch.setattr(ovq.convert.cache, "MOST_CROPPED", most)
    assert torch.equal(answer(model, prompt_lookup_num_tokens=6), expected)


def test_assistants_give_the_greedy_answer(model, expected):
    assert torch.equal(answer(model, assistant_model=original().double()), expected)
    # A converted model may be the assistant, too.
    full = original().double()
    full.generation_config.eos_token_id = None
    assert torch.equal(answer(full, assistant_model=model), answer(full))


@pytest.mark.parametrize("is_converted", [False, True])
def test_assistants_may_have_a_tokenizer_of_their_own(is_converted):
    """Its tokens for the last words change with what follows them, also those before the last crop."""
    vocabulary, letters = byte_vocabulary(), "0123456789"
    merges = list(itertools.product(letters, letters))
    more = {"".join(pair): len(vocabulary) + i for i, pair in enumerate(merges)}
    tokenizers = byte_tokenizer(), wrapped(Tokenizer(models.BPE(vocab=vocabulary | more, merges=merges)))
    torch.manual_seed(0)
    model, assistant = (
        LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": len(each)})).double().eval()
        for each in tokenizers
    )
    assistant = attach(assistant, **MEMORY) if is_converted else make_model(vocab_size=len(tokenizers[1]))
    for each in (model, assistant):
        each.generation_config.eos_token_id = None
    # Digits alone are said, of which the assistant reads two as one token.
    others = sorted({*range(len(tokenizers[0]))} - {vocabulary[letter] for letter in letters})
    options = GREEDY | {"suppress_tokens": others}
    prompt = tokenizers[0]("31415926535897932384626433832795", return_tensors="pt").input_ids
    expected = model.generate(prompt, **options)
    given = {"tokenizer": tokenizers[0], "assistant_tokenizer": tokenizers[1], "assistant_model": assistant}
    assert torch.equal(model.generate(prompt, **options, **given), expected)


def test_who_decodes_after_drafts_does_not_pay_for_recording(model):
    done = answer(model, prompt_lookup_num_tokens=6, return_dict_in_generate=True)
    assert not any(layer.record_past for layer in getattr(done, CACHE_KEY).layers)


def test_drafts_are_verified_with_inputs_that_are_not_rounded(steps):
    model = converted(weight_dtype="int8")
    model.generation_config.eos_token_id = None
    assert torch.equal(answer(model, prompt_lookup_num_tokens=31), answer(model))
    with pytest.raises(ValueError, match=r"prompt_lookup_num_tokens: expected at most 31, .* found 32"):
        answer(model, prompt_lookup_num_tokens=32)


def test_a_schedule_does_not_raise_the_number_of_drafts_above_the_limit(steps):
    model, twin = (converted(weight_dtype="int8") for _ in range(2))
    for one in (model, twin):
        one.generation_config.eos_token_id = None
    expected = model.generate(PROMPT, do_sample=False, max_new_tokens=100)
    options = twin.generation_config
    options.num_assistant_tokens, options.num_assistant_tokens_schedule = 31, "heuristic"
    options.assistant_confidence_threshold = 0
    nums = []
    model.register_forward_hook(lambda *args: nums.append(args[-1].logits.shape[1]))
    found = model.generate(PROMPT, assistant_model=twin, do_sample=False, max_new_tokens=100)
    assert torch.equal(found, expected)
    # All were accepted in the first round.
    assert nums[:2] == [32, 32]
    # This is where the next answer begins.
    assert options.num_assistant_tokens <= 31


@pytest.mark.parametrize("num", [1, 5])
def test_drafts_beside_a_prompt_are_read_as_in_a_call_of_their_own(steps, num):
    model, prompt = converted(weight_dtype="int8"), PROMPT[:, :-num]
    first, second = model.make_cache(), model.make_cache()
    first.num_prompt = prompt.shape[1]
    asked = {"output_hidden_states": True, "attention_mask": torch.ones_like(PROMPT)}
    with torch.no_grad():
        # As in assisted decoding.
        first.activate_past_recording()
        both = model(input_ids=PROMPT, logits_to_keep=num + 1, **asked, **{CACHE_KEY: first})
        before = model(prompt, output_hidden_states=True, **{CACHE_KEY: second})
        drafts = model(PROMPT[:, -num:], **asked, **{CACHE_KEY: second})
    assert torch.equal(both.logits, torch.cat([before.logits[:, -1:], drafts.logits], 1))
    for found, *pair in zip(both.hidden_states, before.hidden_states, drafts.hidden_states, strict=True):
        assert torch.equal(found, torch.cat(pair, 1))
    first.crop(-num)
    assert first.num_columns == prompt.shape[1]


def test_assisted_decoding_reads_the_first_drafts_apart(monkeypatch):
    model, nums, real = converted(weight_dtype="int8"), [], ATTACH.read_apart
    model.generation_config.eos_token_id = None

    def noted(model, num, kwargs):
        nums.append((num, kwargs[CACHE_KEY]))
        return real(model, num, kwargs)

    monkeypatch.setattr(ATTACH, "read_apart", noted)
    answer(model, prompt_lookup_num_tokens=6)
    ((num, cache),) = nums
    assert (num, cache.num_prompt) == (6, None)
    # Others who record what they read may crop all of it.
    cache = model.make_cache()
    cache.activate_past_recording()
    for num_logits in (0, 2):
        model(input_ids=PROMPT, logits_to_keep=num_logits, **{CACHE_KEY: cache})
        cache.crop(-PROMPT.shape[1])
    assert len(nums) == 1


def test_what_a_given_cache_has_read_is_not_read_again(model, expected):
    cache = model.make_cache()
    model(PROMPT[:, :-3], **{CACHE_KEY: cache})
    assert torch.equal(answer(model, prompt_lookup_num_tokens=6, **{CACHE_KEY: cache}), expected)


def states(cache):
    for layer in cache.layers:
        yield from layer.parts().values()


@pytest.fixture(scope="module")
def befores(model):
    """Caches by the number of tokens that they have read. Merges come every 8 tokens."""
    cache, found = model.make_cache(), {}
    with torch.no_grad():
        for start in range(0, 80, 19):
            found[start] = cache.snapshot()
            model(IDS[:1, start : start + 19], **{CACHE_KEY: cache})
    return found


@pytest.mark.parametrize(
    ("sizes", "most", "nums"),
    [
        ([1], 256, [1]),
        ([2, 9, 1], 256, [1, 5, 11]),
        # More than is recorded.
        ([12], 10, [2, 10]),
        ([3] * 4, 8, [1, 8, 9]),
    ],
)
@torch.no_grad()
def test_what_is_cropped_was_never_read(model, befores, sizes, most, nums, monkeypatch):
    monkeypatch.setattr(ovq.convert.cache, "MOST_CROPPED", most)
    for num, (start, before) in itertools.product(nums, befores.items()):
        cache, place = before.snapshot(), start
        cache.activate_past_recording()
        for size in sizes:
            place += size
            model(IDS[:1, place - size : place], **{CACHE_KEY: cache})
        cache.crop(-num)
        expected = before.snapshot()
        if left := sum(sizes) - num:
            model(IDS[:1, start : start + left], **{CACHE_KEY: expected})
        assert cache.get_seq_length() == start + left
        for one, other in zip(states(cache), states(expected), strict=start + left > 0):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernels", "torch"])
@pytest.mark.parametrize("num_read", [10, 40])
def test_what_inference_mode_has_read_goes_on_outside_of_it(dtype, num_read):
    model, logits = converted().to(dtype), []
    for mode in (torch.inference_mode, torch.no_grad):
        cache = model.make_cache()
        cache.activate_past_recording()
        with mode():
            model(IDS[:1, :num_read], **{CACHE_KEY: cache})
        with torch.no_grad():
            model(IDS[:1, num_read : num_read + 9], **{CACHE_KEY: cache})
        with mode():
            model(IDS[:1, num_read + 9 : num_read + 12], **{CACHE_KEY: cache})
        cache.crop(-5)
        with torch.no_grad():
            logits.append(model(IDS[:1, num_read + 7 : num_read + 30], **{CACHE_KEY: cache}).logits)
    assert torch.equal(*logits)


def test_numbers_of_tokens_to_take_out_may_be_tensors(model):
    # So transformers gives them up to version 5.17.
    cache = model.make_cache()
    with torch.no_grad():
        model(IDS[:1, :20], **{CACHE_KEY: cache})
        cache.activate_past_recording()
        for start in (20, 23):
            cache.crop(torch.tensor(0))
            model(IDS[:1, start : start + 6], **{CACHE_KEY: cache})
            cache.crop(torch.tensor(-3))
    assert cache.get_seq_length() == 26


def test_layers_take_the_number_of_drafts_that_transformers_names_since_5_25(model):
    own = OVQForCausalLM(OVQConfig(vocab_size=8, hidden_size=16, num_attention_heads=1, num_hidden_layers=1))
    for cache in (model.make_cache(), own.make_cache()):
        cache.layers[0].activate_past_recording(recurrent_states_to_keep=3)
        assert cache.layers[0].record_past


def test_the_kernel_writes_what_is_taken_out_again(steps):
    """In float32. Merges come every eight tokens here."""
    model = converted(max_distance=48)
    cache = model.make_cache()
    with torch.no_grad():
        model(IDS[:1, :20], **{CACHE_KEY: cache})
        cache.activate_past_recording()
        steps[:] = 0, 0
        for i in range(20, 36):
            expected = model(IDS[:1, i : i + 1], **{CACHE_KEY: cache}).logits
            cache.crop(-1)
            found = model(IDS[:1, i : i + 1], **{CACHE_KEY: cache}).logits
            cache.crop(0)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert steps == [2 * 16, 0]


EXPONENTS = [[[(i + h + n) % 5 - 2 for i in range(8)] for h in range(2)] for n in range(2)]


@pytest.mark.parametrize("fields", [{}, {"weight_dtype": "int8", "state_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("exponents", [None, EXPONENTS], ids=["as they are", "scaled"])
def test_drafts_are_the_tokens_one_by_one_bit_by_bit(fields, exponents, steps):
    model = converted(max_distance=48, **fields)
    # Keys that are multiplied before they are compared, which what is taken out again must not be twice.
    config = dataclasses.replace(model.memory_config, key_exponents=exponents)
    model = attach(original(), config=config, weight_dtype=fields.get("weight_dtype"))
    drafted, plain = model.make_cache(), model.make_cache()
    with torch.no_grad():
        for cache in (drafted, plain):
            model(IDS[:1, :20], **{CACHE_KEY: cache})
        drafted.activate_past_recording()
        steps[:] = 0, 0
        start, sizes = 20, [(6, 2), (3, 0), (8, 5), (8, 8), (8, 0), (1, 1), (7, 3)]
        for num, num_wrong in sizes:
            drafts = IDS[:1, start : start + num].clone()
            drafts[:, num - num_wrong :] += 1
            found = model(drafts, **{CACHE_KEY: drafted}).logits
            drafted.crop(-num_wrong)
            for i in range(num - num_wrong):
                expected = model(IDS[:1, start + i : start + i + 1], **{CACHE_KEY: plain}).logits
                assert torch.equal(found[:, i : i + 1], expected)
            start += num - num_wrong
    assert start == 42
    assert steps == [len(sizes) + 22, 0]
    for x, y in zip(states(drafted), states(plain), strict=True):
        assert torch.equal(x, y)


def test_drafts_that_may_merge_twice_are_left_to_modules():
    """The kernel, which plans one merge, might not end."""
    cache = converted(num_slots=8, window=32).make_cache()
    cache.activate_past_recording()
    assert [_are_drafts(cache, num) for num in (8, 9)] == [True, False]


def test_pieces_of_a_prompt_are_no_drafts(steps):
    """Unpacked, prompts are read by the modules."""
    model = converted(weight_dtype="bfloat16")
    cache = model.make_cache()
    with torch.no_grad():
        for part in IDS[:1, :20].split(4, 1):
            model(part, **{CACHE_KEY: cache})
    assert steps[0] == 0


@torch.no_grad()
def test_what_was_read_before_rows_join_or_columns_go_cannot_be_cropped(model):
    cache = model.make_cache()
    cache.activate_past_recording()
    model(IDS[:1, :40], **{CACHE_KEY: cache})
    joined = type(cache).concatenate([cache])
    cache.shorten([40])
    for one in (joined, cache):
        with pytest.raises(ValueError, match=r"n from 0 to 0, found crop\(-3\)"):
            one.crop(-3)
        model(IDS[:1, 40:43], position_ids=torch.arange(40, 43)[None], **{CACHE_KEY: one})
        one.crop(-3)
        assert [layer.memories[0].num_read(0) for layer in one.layers] == [40, 40]


def test_a_long_prompt_that_is_refused_does_not_stop_the_recording(model):
    layer = model.make_cache().layers[0]
    layer.activate_past_recording()
    q, k = (torch.zeros(1, heads, 300, 8, dtype=torch.float64) for heads in (4, 3))
    with pytest.raises(ValueError, match="expected keys and values of 2 heads"):
        layer.attend(q, k, k, None)
    assert layer.record_past


def test_only_what_was_recorded_can_be_cropped(model):
    cache = model.make_cache()
    with torch.no_grad():
        model(IDS[:1, :20], **{CACHE_KEY: cache})
        with pytest.raises(ValueError, match=r"n from 0 to 0, found crop\(-1\)"):
            cache.crop(-1)
        cache.activate_past_recording()
        model(IDS[:1, 20:23], **{CACHE_KEY: cache})
        for num in (-4, 1):
            with pytest.raises(ValueError, match=rf"n from -3 to 0, found crop\({num}\)"):
                cache.crop(num)
        with pytest.raises(ValueError, match=r"indices in 0\.\.0, found \[1\]"):
            cache.batch_select_indices(torch.tensor([1]))
        assert {layer.num_rows for layer in cache.layers} == {1}
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match=r"n from 0 to 0, found crop\(-1\)"):
            cache.crop(-1)
        # Rows of a batch cannot be cropped.
        model(IDS[:2, 20:23], **{CACHE_KEY: cache})
        with pytest.raises(ValueError, match=r"found crop\(-1\)"):
            cache.crop(-1)


@torch.no_grad()
def test_a_crop_that_one_layer_refuses_changes_no_layer(monkeypatch):
    """Layers with small windows merge earlier, and record fewer of the tokens in one piece."""
    monkeypatch.setattr(ovq.convert.cache, "MOST_CROPPED", 8)
    model = converted(window=[[32, 32], [16, 16]], num_slots=16).double()
    cache = model.make_cache()
    model(IDS[:1, :20], **{CACHE_KEY: cache})
    cache.activate_past_recording()
    for start in range(20, 44, 3):
        model(IDS[:1, start : start + 3], **{CACHE_KEY: cache})
    before = [state.clone() for state in states(cache)]
    with pytest.raises(ValueError, match=r"found crop\(-20\)"):
        cache.crop(-20)
    assert cache.num_columns == 44
    assert all(map(torch.equal, states(cache), before))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 257}, {"assistant_model": original()}])
def test_more_drafts_than_can_be_cropped_are_refused(model, options):
    if "assistant_model" in options:
        options["assistant_model"].generation_config.num_assistant_tokens = 257
    with pytest.raises(ValueError, match=r"num.*_tokens: expected at most 256, .* found 257"):
        answer(model, **options)
