"""A converted model reads a document once; prompts after it get the answers of the whole text."""

import pytest
import torch
from safetensors.torch import save_file

from ovq.convert import build_context, context_info, load_context, save_context
from ovq.hf.streaming import stream_tokens
from tests.convert.common import converted, tokens

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


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


def test_contexts_are_only_for_the_model_and_memory_that_made_them(tmp_path):
    model, path = converted(), tmp_path / "book.ctx"
    save_context(build_context(model, tokens(70)), path)
    with pytest.raises(ValueError, match="this very model and memory"):
        load_context(path, converted(num_slots=8))
    other = converted()
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="this very model and memory"):
        load_context(path, other)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="expected a context of a converted model"):
        load_context(path, model)


def test_a_file_tells_what_it_holds_without_the_model(tmp_path):
    # Nothing is brought nearer, and so forgotten, in so few tokens.
    model = converted(max_distance=4096)
    context = build_context(model, tokens(70))
    save_context(context, tmp_path / "book.ctx")
    info = context_info(tmp_path / "book.ctx")
    assert (info.num_tokens, info.config, info.dtype) == (70, model.memory_config, "torch.float32")
    assert sum(info.layer_bytes) == info.nbytes
    # Behind 2 sinks, 8 of 68 tokens at a time are merged once a window of 16 is full; one head has no slots.
    assert [int(counts.sum()) for counts in info.counts] == [56, 2 * 56]
    assert [len(counts) for counts in info.counts] == [16, 8 + 16]
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
