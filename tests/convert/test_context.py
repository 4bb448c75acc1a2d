"""A converted model reads a document once; prompts after it get the answers of the whole text."""

import json
from itertools import islice

import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ovq.convert import build_context, context_info, load_context, save_context
from ovq.hf.context import Context
from ovq.hf.context_file import digest
from ovq.hf.streaming import stream_tokens
from tests.convert.common import converted, tokens
from tests.hf.common import make_model

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def saved(tmp_path):
    """A model, and the file of a context of it."""
    model = converted()
    save_context(build_context(model, tokens(70)), tmp_path / "book.ctx")
    return model, tmp_path / "book.ctx"


def test_prompts_after_a_context_get_the_answers_of_the_whole_text(tmp_path):
    model, document = converted(), tokens(70)
    save_context(build_context(model, document, prefill_chunk_size=23), tmp_path / "book.ctx")
    context = load_context(tmp_path / "book.ctx", model)
    prompts = [[3, 9, 1], [7], [5, 5, 2, 8]]
    found = model.generate(**context.inputs(prompts), **GREEDY)
    for prompt, row in zip(prompts, found, strict=True):
        whole = torch.cat([document, torch.tensor(prompt)])[None]
        assert row[4:].tolist() == model.generate(whole, **GREEDY)[0, whole.shape[1] :].tolist()
    # Using a context does not change it.
    assert torch.equal(model.generate(**context.inputs(prompts), **GREEDY), found)
    beams = model.generate(**context.inputs(prompts[:1]), num_beams=2, **GREEDY)
    assert beams.shape == (1, 11)


def test_what_was_read_token_by_token_is_saved(tmp_path):
    model = converted()
    cache = model.make_cache()
    for _ in islice(stream_tokens(model, tokens(20).tolist(), cache=cache, eos_token_id=None), 15):
        pass
    context = Context.of(model, cache)
    save_context(context, tmp_path / "book.ctx")
    found = model.generate(**load_context(tmp_path / "book.ctx", model).inputs([[3, 9, 1]]), **GREEDY)
    assert torch.equal(found, model.generate(**context.inputs([[3, 9, 1]]), **GREEDY))


def test_padding_is_no_part_of_a_context():
    model, cache = converted(), converted().make_cache()
    mask = torch.ones(1, 30, dtype=torch.long).index_fill(1, torch.arange(4), 0)
    with torch.no_grad():
        model(tokens(1, 30), attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match=r"a cache of one row .* and no padding, found MemoryCache"):
        Context.of(model, cache)


def test_a_model_whose_weights_are_elsewhere_has_contexts(saved):
    model, path = saved
    expected = model.generate(**load_context(path, model).inputs([[3, 9, 1]]), **GREEDY)
    cpu_offload(model)
    assert model.device == torch.device("cpu")
    for context in (load_context(path, model), build_context(model, tokens(70))):
        assert torch.equal(model.generate(**context.inputs([[3, 9, 1]]), **GREEDY), expected)


def test_slots_in_fewer_bytes_are_saved_in_as_few(tmp_path):
    model, document = converted(state_dtype="int8"), tokens(70)
    save_context(build_context(model, document), tmp_path / "book.ctx")
    save_context(build_context(converted(), document), tmp_path / "wide.ctx")
    assert (tmp_path / "book.ctx").stat().st_size < (tmp_path / "wide.ctx").stat().st_size
    context = load_context(tmp_path / "book.ctx", model)
    found = model.generate(**context.inputs([[3, 9, 1]]), **GREEDY)
    whole = torch.cat([document, torch.tensor([3, 9, 1])])[None]
    assert found[0, 4:].tolist() == model.generate(whole, **GREEDY)[0, whole.shape[1] + 1 :].tolist()
    with pytest.raises(ValueError, match=r"state_dtype='float32'"):
        load_context(tmp_path / "book.ctx", converted())


def test_contexts_are_only_for_the_model_and_memory_that_made_them(saved):
    model, path = saved
    # Of heads with budgets of their own, a single number would say nothing.
    sizes = r"of this conversion \(28 rows per head on average\), found one of another \(30 rows"
    with pytest.raises(
        ValueError, match=rf"{sizes} per head on average\), with other num_slots: build it aga"
    ):
        load_context(path, converted(num_slots=8))
    with pytest.raises(ValueError, match="made with chunk_size=4, as the model has, found chunk_size=8"):
        load_context(path, converted(chunk_size=4))
    other = converted()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="expected a context of this very model"):
        load_context(path, other)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected a saved context"):
        load_context(path, model)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("layers.1.0.count"), r"layer 1: .* they differ in \['0.count'\]"),
        (
            lambda t: t.update({"layers.7.0.count": t["layers.1.0.count"].clone()}),
            "tensors of 2 layers, found 'layers.7",
        ),
        (lambda t: t["layers.0.0.num_seen"].add_(8), r"layer 0: expected num_seen \[70\], found \[78\]"),
        (
            lambda t: t.update({"layers.0.0.filled": torch.ones(2), "layers.0.0.num_merged": torch.ones(3)}),
            r"layer 0: expected 18 tensors, .* differ in \['0.filled', '0.num_merged'\]",
        ),
        (lambda t: t["layers.1.0.count"].neg_(), "layer 1: expected counts of at least 0, found"),
        (lambda t: t["layers.1.0.count"].add_(7), "layer 1: expected counts that add up to at most the"),
        (lambda t: t["layers.1.0.count"].fill_(2**62), "layer 1: expected counts that add up within int64"),
        (lambda t: t["layers.0.0.key_sum"].fill_(torch.nan), "expected finite values in 0.key_sum"),
        (
            lambda t: t.update(
                {"layers.0.0.pending_keys": t["layers.0.0.pending_keys"][:, :, 1:].contiguous()}
            ),
            "expected 0.pending_keys of shape",
        ),
    ],
)
def test_what_cannot_be_the_memory_of_the_model_is_refused(saved, change, expected):
    """Even where the digest is right: the file may come from anywhere."""
    model, path = saved
    rewrite(path, change)
    for read in (context_info, lambda path: load_context(path, model)):
        with pytest.raises(ValueError, match=expected):
            read(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_slots", [[2**62, 0], [8, 16]]),
        ("num_sinks", 10**30),
        ("token_use", False),
        ("key_exponents", {}),
        ("rotary_frequencies", 0),
        ("slot_bias", [[10**400] * 4] * 2),
    ],
)
def test_a_config_with_impossible_values_is_refused(saved, field, value):
    model, path = saved
    rewrite(path, lambda t: None, config=json.dumps(model.memory_fields() | {field: value}))
    with pytest.raises(ValueError, match=f"expected the config of a model, .*{field}: expected"):
        context_info(path)


def test_empty_keys_do_not_claim_a_size(saved):
    _, path = saved
    rewrite(path, lambda t: t.update({"layers.0.0.pending_keys": torch.zeros(1, 1, 0, 2**62)}))
    with pytest.raises(ValueError, match=r"expected 0\.key_sum of shape \[1, 1, 16, 0\]"):
        context_info(path)


def rename_as_before(tensors):
    """Give the tensors the names of version 0.2, in place."""
    for name in list(tensors):
        group, _, own = name.rpartition(".")
        if own == "num_seen":
            num_seen, num_merged = tensors.pop(name), torch.tensor([56])
            tensors |= {f"{group}.filled": num_seen - num_merged, f"{group}.num_merged": num_merged}
        elif own in ("pending_keys", "pending_values", "token_use"):
            old = own.removeprefix("token_").replace("pending", "recent")
            tensors[f"{group}.{old}"] = tensors.pop(name)


def rewrite(path, change, **header):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata={**metadata, "content": digest(tensors), **header})


def test_contexts_of_earlier_versions_go_on_loading(tmp_path):
    model, path = converted(), tmp_path / "book.ctx"
    context = build_context(model, tokens(70))
    save_context(context, path)
    rewrite(path, rename_as_before, format="ovq-converted-context", version="2", kind="")
    inputs = [load.inputs([[3, 9, 1]]) for load in (load_context(path, model), context)]
    found, expected = (model.generate(**given, **GREEDY) for given in inputs)
    assert torch.equal(found, expected)
    assert context_info(path).config == model.memory_config


def test_contexts_of_other_kinds_of_models_are_refused(tmp_path):
    model, path = converted(), tmp_path / "book.ctx"
    save_context(build_context(make_model(), [1, 2, 3]), path)
    with pytest.raises(ValueError, match="of a model of kind 'converted', found one of 'ovq'"):
        load_context(path, model)
    rewrite(path, lambda t: None, kind="other")
    with pytest.raises(ValueError, match="of kind ovq, converted, found 'other'"):
        context_info(path)


def test_a_file_tells_what_it_holds_without_the_model(tmp_path):
    # Nothing is re-positioned, and so forgotten, in so few tokens.
    model = converted(max_distance=4096)
    context = build_context(model, tokens(70))
    save_context(context, tmp_path / "book.ctx")
    info = context_info(tmp_path / "book.ctx")
    assert (info.num_tokens, info.config, info.dtype) == (70, model.memory_config, "torch.float32")
    memories = [layer.memories for layer in info.cache.layers]
    assert info.cache.nbytes == info.nbytes == context.nbytes
    # Behind 2 sinks, 8 of 68 tokens at a time are merged once a window of 16 is full; one head has no slots.
    counts = [torch.cat([memory.state.count.flatten() for memory in of_layer]) for of_layer in memories]
    assert [int(count.sum()) for count in counts] == [56, 2 * 56]
    assert [int((count > 0).sum()) for count in counts] == [16, 8 + 16]
    save_file({}, tmp_path / "other.ctx", metadata={"format": "ovq-converted-context", "version": "1"})
    with pytest.raises(ValueError, match=r"other\.ctx: expected version '2', found '1'"):
        context_info(tmp_path / "other.ctx")


def test_a_context_has_constant_bytes():
    model = converted()
    assert build_context(model, tokens(200)).nbytes == build_context(model, tokens(40)).nbytes


def test_tokens_are_streamed_as_they_are_generated():
    model, ids = converted(), tokens(50)
    stream = stream_tokens(model, ids.tolist(), prefill_chunk_size=17)
    whole = model.generate(ids[None], **GREEDY)[0, 50:].tolist()
    assert [next(stream) for _ in whole] == whole
