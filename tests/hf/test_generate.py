"""`generate`: every way of decoding gives what the model without a cache gives."""

import copy
import inspect

import pytest
import torch
from transformers import GenerationMixin, pipeline
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from ovq.byte_tokens import byte_tokenizer
from ovq.hf import OVQCache
from ovq.hf.cache import CACHE_KEY
from tests.hf.common import enable_checkpointing, is_greedy, left_padded, make_model, random_ids

NEW = 6
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}


@pytest.fixture(scope="module")
def batch():
    """Prompts of unequal length, whose chunks of 4 tokens end at different steps of the decoding."""
    ids, mask = left_padded([random_ids(1, n, seed=n)[0] for n in (11, 6, 1)])
    return {"input_ids": ids, "attention_mask": mask}


def test_greedy_decoding_of_padded_prompts_equals_that_of_each_alone(model, batch):
    out = model.generate(**batch, **GREEDY)
    width = batch["input_ids"].shape[1]
    for row, mask in enumerate(batch["attention_mask"].bool()):
        prompt = batch["input_ids"][row, mask]
        assert torch.equal(out[row, width - len(prompt) : width], prompt)
        assert is_greedy(model, out[row, width - len(prompt) :], NEW)
    assert len({tuple(row[width:].tolist()) for row in out}) == 3, "a model that repeats itself shows nothing"


def test_in_training_with_gradient_checkpointing_it_goes_without_a_cache(batch):
    model = make_model()
    expected = model.generate(**batch, **GREEDY)
    enable_checkpointing(model.train(), use_reentrant=False)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.7, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 2},
        {"repetition_penalty": 1.5},
        {"eos_token_id": [1, 2, 3]},
    ],
    ids=str,
)
def test_with_and_without_cache_alike(model, batch, options):
    outs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        outs.append(model.generate(**batch, **{**GREEDY, **options}, use_cache=use_cache))
    assert torch.equal(*outs)
    assert outs[0].shape[1] > batch["input_ids"].shape[1] + 4


@pytest.mark.parametrize(("num_beams", "chunks"), [(1, (1, 3, 4, 50)), (2, (3,))])
def test_prefill_in_chunks(model, batch, num_beams, chunks):
    expected = model.generate(**batch, **GREEDY, num_beams=num_beams)
    for chunk in chunks:
        out = model.generate(**batch, **GREEDY, num_beams=num_beams, prefill_chunk_size=chunk)
        assert torch.equal(out, expected), chunk


def test_continuing_from_a_returned_cache(model, batch):
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    returned = getattr(first, CACHE_KEY)
    assert isinstance(returned, OVQCache)
    text = torch.cat([first.sequences, random_ids(3, 5, seed=9)], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, NEW + 5, dtype=torch.long)], 1)
    kept = copy.deepcopy(returned)
    expected = model.generate(text, attention_mask=mask, **GREEDY)
    for cache in (returned, kept):
        out = model.generate(text, attention_mask=mask, **{CACHE_KEY: cache}, **GREEDY)
        assert torch.equal(out, expected)


def test_continuing_from_a_prefix_shared_by_many(model):
    prefix, questions = random_ids(1, 10), random_ids(3, 4, seed=5)
    cache = OVQCache(model.config)
    model(prefix, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    text = torch.cat([prefix.expand(3, -1), questions], 1)
    mask = torch.ones_like(text)
    out = model.generate(text, attention_mask=mask, **{CACHE_KEY: cache}, **GREEDY)
    assert torch.equal(out, model.generate(text, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 3}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize(("num_read", "is_padded"), [(11, False), (14, True)])
def test_the_last_ids_alone_may_be_given_with_a_cache_that_has_read_some_of_them(
    model, options, num_read, is_padded
):
    ids = random_ids(2, 15)
    mask = torch.ones_like(ids)
    mask[0, : 2 * is_padded] = 0
    cache = OVQCache(model.config)
    model(ids[:, :num_read], mask[:, :num_read], past_key_values=cache)
    given = {"attention_mask": mask, CACHE_KEY: cache, **GREEDY, **options}
    if "prefill_chunk_size" in options and "prefill_ids" not in inspect.getsource(GenerationMixin._prefill):
        # Earlier versions of transformers cut the mask as if the cache had read nothing.
        with pytest.raises(ValueError, match="expected an attention_mask of shape"):
            model.generate(ids[:, 11:], **given)
        return
    out = model.generate(ids[:, 11:], **given)
    expected = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    assert torch.equal(out, expected[:, 11:])


def test_ids_that_leave_out_columns_are_refused(model):
    ids, cache = random_ids(1, 15), OVQCache(model.config)
    mask = torch.ones_like(ids)
    model(ids[:, :9], past_key_values=cache)
    given = {"attention_mask": mask, CACHE_KEY: cache, **GREEDY}
    with pytest.raises(ValueError, match=r"at least the last 6 of 15 columns, .*, found 5"):
        model.generate(ids[:, 10:], **given)
    with pytest.raises(ValueError, match=r"expected all 15 columns in assisted decoding, .* found 6"):
        model.generate(ids[:, 9:], **given, prompt_lookup_num_tokens=3)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("length", [7, 10])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_a_prompt_that_was_read_is_refused(model, length, options):
    """There would be nothing to go on from; transformers would read all of it a second time."""
    prompt, cache = random_ids(1, 10), OVQCache(model.config)
    model(prompt, past_key_values=cache)
    before = cache.snapshot()
    for name, inputs in (("inputs", prompt), ("inputs_embeds", model.get_input_embeddings()(prompt))):
        with pytest.raises(ValueError, match=f"more tokens than the 10 columns .*, found {length}"):
            model.generate(**{name: inputs[:, :length], CACHE_KEY: cache}, **GREEDY, **options)
    # Nothing was read, so that the cache goes on.
    question = torch.tensor([[3]])
    outs = [model(question, past_key_values=c).logits for c in (cache, before)]
    assert torch.equal(*outs)


def test_a_cache_that_is_not_to_be_used_is_refused(model):
    """Without a mask, each step would read the whole text again, after what the cache has read."""
    with pytest.raises(ValueError, match="use_cache: expected True with a cache that is given, found False"):
        model.generate(random_ids(1, 4), **{CACHE_KEY: OVQCache(model.config)}, use_cache=False, **GREEDY)


def test_scores_with_cache_are_those_without(model, batch):
    outs = [
        model.generate(
            **batch, **GREEDY, use_cache=use_cache, return_dict_in_generate=True, output_logits=True
        )
        for use_cache in (True, False)
    ]
    torch.testing.assert_close(outs[0].logits, outs[1].logits)


def test_generation_from_embeddings(model):
    ids = random_ids(2, 7)
    embeds = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    out = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, **GREEDY)[:, 7:])


@pytest.mark.parametrize("length", [3, 9, 12])
def test_embeddings_of_the_last_columns_alone_are_refused(model, length):
    """transformers would leave out the first 9 of them, which it takes for those that the cache has read."""
    ids, cache = random_ids(1, 9 + length), OVQCache(model.config)
    model(ids[:, :9], past_key_values=cache)
    given = {"attention_mask": torch.ones_like(ids), CACHE_KEY: cache, **GREEDY}
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match=f"of all {9 + length} columns, .*, found {length}"):
        model.generate(inputs_embeds=embeds[:, 9:], **given)
    out = model.generate(inputs_embeds=embeds, **given)
    assert torch.equal(out, model.generate(ids, **GREEDY)[:, 9 + length :])


@pytest.mark.parametrize("has_ids", [False, True])
def test_embeddings_in_chunks_are_refused(model, has_ids):
    """transformers would give all of them with each chunk of the ids."""
    ids = random_ids(1, 7)
    given = {"inputs_embeds": model.get_input_embeddings()(ids)} | ({"input_ids": ids} if has_ids else {})
    with pytest.raises(ValueError, match="prefill_chunk_size: expected None with inputs_embeds, found 3"):
        model.generate(**given, **GREEDY, prefill_chunk_size=3)


def test_generation_with_more_slots_than_in_training():
    model, ids = make_model(), random_ids(2, 30)
    mask = torch.ones_like(ids)
    model.set_num_slots(64)
    out = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY))


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"mixer_types": [m] * 4, "rope_mixers": [m]}
            for m in ("ovq", "full_attention", "sliding_attention")
        ),
        {"growth": "linear", "init": "random"},
        {"growth": "immediate", "merge": "updated"},
        {"ablation": {"bias": "count+norm", "rate": 0.3}},
        {"conv_size": 0, "chunk_size": 1},
    ],
    ids=str,
)
def test_other_models_generate_too(batch, changes):
    model = make_model(**changes)
    outs = [model.generate(**batch, **GREEDY, use_cache=use_cache) for use_cache in (True, False)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_stop_strings_end_a_text(model, options):
    # Bytes that token healing, which reads the text of the prompt, does not take for spaces.
    prompt, tokenizer = torch.tensor([[40, 35, 47, 33, 44, 38]]), byte_tokenizer()
    whole = model.generate(prompt, **GREEDY, **options)
    # The prompt's tokens do not count.
    new = whole[0, 6:].tolist()
    stopping = {"stop_strings": [tokenizer.decode(new[2:3])], "tokenizer": tokenizer}
    out = model.generate(prompt, **GREEDY, **options, **stopping)
    if "num_beams" in options:
        # Other beams than the best whole text may end first.
        assert torch.equal(out, model.generate(prompt, **GREEDY, **options, **stopping, use_cache=False))
    else:
        assert torch.equal(out, whole[:, : 7 + new.index(new[2])])
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.eos_token
    healed = {"token_healing": True, "bos_token_id": 0, "tokenizer": tokenizer}
    assert torch.equal(model.generate(prompt, **GREEDY, **options, **healed), whole)


def test_a_pipeline_stops_at_a_sequence():
    tokenizer = byte_tokenizer()
    model = make_model(vocab_size=len(tokenizer))
    text = pipeline("text-generation", model=model, tokenizer=tokenizer, return_full_text=False)
    options = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0}
    whole = text("hello", **options)[0]["generated_text"]
    assert text("hello", **options, stop_sequence=whole[1])[0]["generated_text"] == whole[:2]


# transformers takes "hybrid" for None, as models of earlier versions have it in their configs.
@pytest.mark.parametrize("implementation", sorted({*ALL_CACHE_IMPLEMENTATIONS, "paged"} - {"hybrid"}))
def test_other_cache_implementations_are_refused(model, batch, implementation):
    if implementation == "dynamic":
        expected = model.generate(**batch, **GREEDY)
        assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="dynamic"), expected)
        return
    with pytest.raises(ValueError, match=f"None or 'dynamic', found '{implementation}'"):
        model.generate(**batch, **GREEDY, cache_implementation=implementation)
    config = copy.deepcopy(model.generation_config)
    config.update(**GREEDY, cache_implementation=implementation)
    with pytest.raises(ValueError, match=f"None or 'dynamic', found '{implementation}'"):
        model.generate(**batch, generation_config=config)


def test_continuous_batching_is_refused(model):
    prompts = [[1, 2, 3], [4]]
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch(prompts, max_new_tokens=2)
    with pytest.raises(ValueError, match="continuous batching"):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match="continuous batching"), model.continuous_batching_context_manager():
        pass
