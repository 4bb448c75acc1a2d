"""Converted models compute what they did until something is merged, and then need constant memory."""

import copy
import io
import multiprocessing
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from ovq.convert import attach
from ovq.convert.captures import capture
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.cache import CACHE_KEY
from ovq.parallel import ContextParallel
from tests.convert.common import CAN_BE_PICKLED, IDS, KINDS, MEMORY, SIZES, converted, original, tokens
from tests.hf.common import enable_checkpointing

TINY = {"atol": 2e-5, "rtol": 0}
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def read(model, ids, sizes, **inputs):
    """Logits of tokens read in pieces, and the cache."""
    cache = model.make_cache()
    with torch.no_grad():
        pieces = [model(piece, **{CACHE_KEY: cache}, **inputs).logits for piece in ids.split(sizes, dim=1)]
    return torch.cat(pieces, dim=1), cache


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_changes_until_something_is_merged(kind):
    before, after, ids = original(kind), converted(kind), tokens(2, 40)
    num_kept = MEMORY["num_sinks"] + 16
    expected, found = before(ids).logits, after(ids).logits
    torch.testing.assert_close(found[:, :num_kept], expected[:, :num_kept], **TINY)
    # The comparison can fail: after merges there is a difference.
    assert (found - expected)[:, -1].abs().max() > 1e-3


@torch.no_grad()
def test_slots_of_one_token_each_are_exact():
    ids = tokens(1, 90)
    model = converted(num_slots=96, window=16, max_distance=4096)
    torch.testing.assert_close(model(ids).logits, original()(ids).logits, **TINY)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_of_a_text_gives_the_same(kind):
    model, ids = converted(kind), tokens(2, 80)
    whole, cache = read(model, ids, 80)
    parts, other = read(model, ids, [1, 30, 2, 1, 40, 6])
    torch.testing.assert_close(parts, whole, **TINY)
    for mine, its in zip(cache.layers, other.layers, strict=True):
        for name, tensor in mine.tensors().items():
            torch.testing.assert_close(its.tensors()[name], tensor, msg=name, **TINY)


@settings(max_examples=4, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    pads=st.lists(st.integers(0, 20), min_size=2, max_size=2),
    merge=st.sampled_from(["nearest", "updated", "existing"]),
    seed=st.integers(0, 99),
)
def test_rows_do_not_depend_on_padding_or_each_other(sizes, pads, merge, seed):
    model, length = converted(merge=merge), sum(sizes)
    rows = [tokens(1, length, seed=seed), tokens(1, length, seed=seed + 1)]
    width = length + max(pads)
    ids = torch.zeros(2, width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, (row, pad) in enumerate(zip(rows, pads, strict=True)):
        start = width - length - pad
        # Padding left of the row, and right of it.
        ids[i, start : start + length], mask[i, start : start + length] = row[0], 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, logits, done = model.make_cache(), [], 0
    for size in [*sizes, max(pads)]:
        part = slice(done, done + size)
        if size:
            inputs = {"attention_mask": mask[:, : done + size], "position_ids": places[:, part]}
            with torch.no_grad():
                logits.append(model(ids[:, part], **inputs, **{CACHE_KEY: cache}).logits)
        done += size
    found = torch.cat(logits, 1)
    for i, row in enumerate(rows):
        alone = model(row).logits[0]
        torch.testing.assert_close(found[i, mask[i] == 1], alone, **TINY)


def test_the_memory_has_constant_bytes():
    # Nothing is re-positioned, and so forgotten, in so few tokens.
    model = converted(max_distance=4096)
    _, cache = read(model, tokens(1, 400), [30, 170, 200])
    _, short = read(model, tokens(1, 30), 30)
    assert cache.nbytes == short.nbytes
    assert cache.layers[0].memories[0].num_merged == [384]
    counts = [m.state.count.sum(-1) for layer in cache.layers for m in layer.memories if m.budget.num_slots]
    assert all((count == 384).all() for count in counts)


@torch.no_grad()
def test_slots_are_the_means_of_what_was_merged():
    model = converted(num_slots=4, window=16, max_distance=4096)
    ids = tokens(1, 66)
    # With room for all, keys and values are kept as they are; the first layer does not depend on later ones.
    _, exact = read(converted(num_slots=0, window=72), ids, 66)
    _, cache = read(model, ids, 66)
    memory, rows = cache.layers[0].memories[0], exact.layers[0].memories[0]
    merged = slice(2, 2 + memory.num_merged[0])
    state, exact = memory.state, rows.state
    for mean, row in ((state.keys, exact.pending_keys), (state.values, exact.pending_values)):
        total = (mean * state.count[..., None]).sum(2)
        torch.testing.assert_close(total, row[:, :, merged].sum(2), atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_leaves_a_window_without_slots_is_forgotten():
    model = converted(num_slots=0, window=16)
    ids = tokens(1, 100)
    other = ids.clone()
    # The second layer may see through the first one.
    other[0, 2:60] = tokens(58, seed=1)
    assert torch.allclose(model(ids).logits[0, -1], model(other).logits[0, -1], **TINY)
    slots = converted(num_slots=16, window=16)
    assert not torch.allclose(slots(ids).logits[0, -1], slots(other).logits[0, -1], **TINY)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 13}], ids=str)
def test_generate_gives_the_same_with_and_without_a_cache(options):
    model, ids = converted(), tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    plain = {k: v for k, v in options.items() if k == "num_beams"}
    found = model.generate(ids, attention_mask=mask, **GREEDY, **options)
    expected = model.generate(ids, attention_mask=mask, use_cache=False, **GREEDY, **plain)
    assert torch.equal(found, expected)


def test_generation_continues_from_a_cache():
    model, ids = converted(), tokens(1, 50)
    _, cache = read(model, ids[:, :40], 40)
    again = cache.snapshot()
    expected = model.generate(ids, **GREEDY)
    for one in (cache, again):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_KEY: one}, **GREEDY)
        assert torch.equal(found, expected)
    beams = model.generate(ids, num_beams=2, **GREEDY)
    _, cache = read(model, ids[:, :40], 40)
    assert torch.equal(model.generate(ids, num_beams=2, **{CACHE_KEY: cache}, **GREEDY), beams)


def test_a_cache_that_generate_is_given_is_the_callers():
    """Where transformers decodes a token too many, it takes that out of such a cache alone."""
    model = converted()
    given = {CACHE_KEY: model.make_cache(), **GREEDY}
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        model.generate(tokens(1, 5), **given, cache_implementation="dynamic")


def test_gradients_reach_the_tokens_of_the_window():
    model = converted()
    ids = tokens(1, 60)
    loss = model(ids, labels=ids).loss
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    # As long as nothing is merged, they are those of the model before.
    before, after, short = original(), converted(), tokens(1, 17)
    for m in (before, after):
        m(short, labels=short).loss.backward()
    for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_goes_without_a_cache():
    model, ids = converted(), tokens(1, 60)
    cache = model(ids).past_key_values
    (expected := model(ids, labels=ids)).loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    enable_checkpointing(model.train(), use_reentrant=False)
    found = model(ids, labels=ids)
    found.loss.backward()
    assert found.past_key_values is None
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close([p.grad for p in model.parameters()], grads)
    with pytest.raises(ValueError, match="no cache while training with gradient checkpointing"):
        model(ids, past_key_values=cache)
    assert cache.num_columns == 60
    generated = model.generate(ids, **GREEDY)
    assert torch.equal(generated, model.eval().generate(ids, **GREEDY))


def test_layers_may_be_checkpointed_from_outside_the_model():
    """As FSDP does."""
    ids, grads = tokens(1, 60), []
    for is_wrapped in (False, True):
        model = converted().train()
        if is_wrapped:
            apply_activation_checkpointing(model, check_fn=lambda x: hasattr(x, "self_attn"))
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_bfloat16_models_keep_slots_in_float32():
    model = attach(original().to(torch.bfloat16), **MEMORY)
    _, cache = read(model, tokens(1, 90), 90)
    memory = cache.layers[0].memories[0]
    assert (memory.state.pending_keys.dtype, memory.state.keys.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)), "full attention in every layer"),
        (lambda: MistralForCausalLM(MistralConfig(**SIZES)), "sliding_window None"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2)).eval(), None),
        (lambda: torch.nn.Linear(1, 1), "a model of transformers"),
        (lambda: OVQForCausalLM(OVQConfig(**SIZES)), "found one of this library"),
        (converted, "not converted yet"),
        (lambda: LlamaModel(LlamaConfig(**SIZES)), "found one that cannot generate text"),
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)), "found one that cannot generate text"),
        (lambda: original().to("meta"), "found them on the meta device"),
    ],
    ids=["gemma2", "mistral", "gpt2", "linear", "ovq", "converted", "base", "classifier", "meta"],
)
def test_models_that_do_not_fit_are_refused_and_left_as_they_were(model, message):
    model = model()
    if message is None:
        # Learned positions and another config, but the same seams: it works.
        assert attach(model, num_slots=8, window=8, chunk_size=8).make_cache().num_rows == 0
        return
    kind = type(model)
    with pytest.raises(ValueError, match=message):
        attach(model, **MEMORY)
    assert type(model) is kind


def test_parts_of_a_model_stay_in_their_modes():
    model = original().train()
    model.base_model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    capture(model, tokens(1, 30)[0], None, 0)
    attach(model, **MEMORY)
    assert {name: module.training for name, module in model.named_modules()} == before


@torch.no_grad()
def test_models_that_share_a_config_stay_as_they_are(monkeypatch):
    config = LlamaConfig(**SIZES)
    model, other = (LlamaForCausalLM(config).eval() for _ in range(2))
    fields, before = config.to_dict(), other(IDS).logits
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["ovq.convert.attach"], "check_equal", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attach(model, **MEMORY)
    assert all(module.config is config for module in model.modules() if hasattr(module, "config"))
    attach(model, **MEMORY)
    assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
    assert (other.config, config.to_dict(), config._attn_implementation) == (config, fields, "sdpa")
    assert torch.equal(other(IDS).logits, before)
    with pytest.raises(ValueError, match=r"or convert it \(as reference of trl: ref_model="):
        LlamaForCausalLM(model.config)(IDS)


def test_a_model_whose_window_is_taken_away_is_converted():
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).eval()
    with pytest.raises(ValueError, match="set it to None"):
        attach(model, **MEMORY)
    model.config.sliding_window = None
    assert attach(model, **MEMORY)(tokens(1, 60)).logits.shape == (1, 60, 64)


def test_attention_of_another_kind_is_found_by_comparing(monkeypatch):
    model = original()
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward

    def twice(self, *args, **kwargs):
        # As a model would that adds something of its own to attention.
        self.scaling = 0.1 if self.config._attn_implementation == "ovq_memory" else 0.9
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", twice)
    # As `AutoModelForCausalLM` loads the folder of a converted model.
    model.config.ovq_memory = {"of": "before"}
    with pytest.raises(ValueError, match="same logits before and after"):
        attach(model, **MEMORY)
    assert model.config._attn_implementation == "sdpa"
    assert model.config.ovq_memory == {"of": "before"}
    assert not hasattr(model, "make_cache")


@torch.no_grad()
def test_a_mask_that_no_layer_reads_may_be_of_a_window():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen2MoeConfig(**SIZES, **experts, shared_expert_intermediate_size=16)
    model, ids = Qwen2MoeForCausalLM(config).eval(), tokens(2, 16)
    expected = model(ids).logits
    torch.testing.assert_close(attach(model, **MEMORY)(ids).logits, expected, **TINY)


def test_what_a_memory_cannot_do_is_refused():
    model, ids = converted(), tokens(1, 10)
    with pytest.raises(ValueError, match="expected a MemoryCache"):
        model(ids, **{CACHE_KEY: DynamicCache()})
    with pytest.raises(ValueError, match="expected a MemoryCache"):
        # As peft's prefix tuning does in `generate`.
        model(ids, past_key_values=DynamicCache(), cache=model.make_cache())
    with pytest.raises(ValueError, match="expected a MemoryCache"):
        model.generate(ids, **{CACHE_KEY: DynamicCache()}, **GREEDY)
    cache = model.make_cache()
    with pytest.raises(ValueError, match="a mask \\[B, T\\]"):
        model(ids, attention_mask=torch.ones(1, 1, 10, 10), **{CACHE_KEY: cache})
    # The cache is as it was.
    assert torch.equal(model(ids, **{CACHE_KEY: cache}).logits, model(ids).logits)
    for other in (torch.ones(1, 8), torch.ones(2, 10)):
        with pytest.raises(ValueError, match="expected 1 rows of at least the 10 new tokens"):
            model(ids, attention_mask=other)
    with pytest.raises(ValueError, match=r"expected a causal one, .* found a window"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 4, 9, 10, 11, 12, 13]]), use_cache=False)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(ids, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match=r"continuous batching.*: a state has no pages; call generate"):
        # transformers would advise another attention, which is refused as well.
        model.generate_batch([[1, 2, 3], [4]])
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="prefill_chunk_size: expected None with inputs_embeds, found 3"):
        model.generate(inputs_embeds=embeds, prefill_chunk_size=3, **GREEDY)
    with pytest.raises(ValueError, match="found LlamaForCausalLM: other models, wrapped and conv"):
        ContextParallel(model)


def test_the_memory_is_not_turned_off_by_another_attention():
    model, ids = converted(), tokens(1, 60)
    expected = model(ids).logits
    with pytest.raises(ValueError, match=r"attn_implementation: expected 'ovq_memory', .* found 'eager'"):
        model.set_attn_implementation("eager")
    assert torch.equal(model(ids).logits, expected)
    model.config._attn_implementation = "sdpa"
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"attn_implementation: expected 'ovq_memory', .* found 'sdpa'"):
            model(ids, use_cache=use_cache)
    model.set_attn_implementation({"": "ovq_memory"})
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"num_slots": -1}, "num_slots: expected an integer of at least 0, found -1"),
        ({"window": 20}, r"window: expected a multiple of chunk_size \(8\), found 20"),
        ({"num_slots": [[1, 2]]}, r"num_slots: expected numbers for \[2, 2\] key/value heads"),
        ({"merge": "best"}, "merge: expected one of"),
        ({"num_sinks": 1.5}, "num_sinks: expected an integer"),
        ({"value_weight": -1}, "value_weight"),
        ({"max_distance": 7}, "max_distance: expected an integer of at least 8, found 7"),
    ],
)
def test_sizes_are_checked(memory, message):
    with pytest.raises(ValueError, match=message):
        converted(**memory)


def test_settings_beside_a_config_are_refused():
    config = converted().memory_config
    with pytest.raises(ValueError, match="config: expected all settings in it, found window, merge"):
        attach(original(), config=config, window=512, merge="existing")
    assert attach(original(), config=config, state_dtype="int8").memory_config.state_dtype == "int8"


def test_the_memory_of_a_converted_model_is_fixed():
    model = converted()
    with pytest.raises(AttributeError, match="memory_config"):
        model.memory_config = converted(num_slots=4).memory_config
    with pytest.raises(ValueError, match="config: expected a MemoryConfig, found dict"):
        attach(original(), config=model.memory_config.to_dict())


def test_the_smallest_window_keeps_one_token():
    model, ids = converted(num_slots=8, window=1, num_sinks=0, chunk_size=1), tokens(1, 20)
    found, expected = model(ids).logits, original()(ids).logits
    # Slots of a token each are exact too.
    torch.testing.assert_close(found[:, :9], expected[:, :9])
    assert (found[:, 12:] - expected[:, 12:]).abs().max() > 1e-3


def saved_whole(model):
    """By `torch.save`, as a module and not as weights."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": saved_whole,
    **{
        f"pickle {n}": lambda m, n=n: pickle.loads(pickle.dumps(m, n))
        for n in (0, 2, pickle.HIGHEST_PROTOCOL)
    },
}


# All ways for one kind of models, and all kinds in one way.
COPIED = [(kind, way) for kind in KINDS for way in COPIES if kind == "llama" or way == "pickle 2"]


@pytest.mark.parametrize(("kind", "way"), COPIED)
def test_a_converted_model_can_be_copied(kind, way):
    if way not in ("copy", "deepcopy") and not CAN_BE_PICKLED:
        pytest.skip("models of transformers cannot be pickled where the library `kernels` is installed")
    again = COPIES[way]
    model, ids = converted(kind).train(), tokens(1, 60)
    model.memory_of_a_user = "kept"
    other = again(again(model))
    assert type(other) is type(model)
    assert isinstance(other, type(original(kind)))
    assert type(other.config) is type(model.config)
    assert (other.training, other.memory_of_a_user) == (True, "kept")
    assert other.memory_config == model.memory_config
    model.eval(), other.eval()
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert torch.equal(other.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    # The part that has the cache made for it, by itself.
    base = again(model.base_model)
    assert torch.equal(base(ids).last_hidden_state, model.base_model(ids).last_hidden_state)


def test_a_class_that_was_changed_again_is_not_lost_in_a_copy():
    """As libraries do that shard models: pickle must refuse it, as it refuses it for other models."""
    model = converted()
    model.__class__ = type("Sharded", (type(model),), {})
    assert type(copy.deepcopy(model)) is type(model)
    with pytest.raises((pickle.PicklingError, AttributeError), match="Sharded"):
        pickle.dumps(model)


def _read(model, ids, queue):
    queue.put(model(ids).logits.tolist())


@pytest.mark.slow
def test_a_converted_model_goes_to_a_process_that_has_imported_nothing():
    model, ids = converted(), tokens(1, 60)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_read, args=(model, ids, queue), daemon=True)
    process.start()
    found = queue.get(timeout=240)
    process.join()
    torch.testing.assert_close(torch.tensor(found), model(ids).logits, **TINY)
