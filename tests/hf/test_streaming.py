"""Streams of tokens are those of `generate`, streams of text those of the tokenizer, and neither grows."""

import gc
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ovq.byte_tokens import byte_tokenizer
from ovq.hf import build_context
from ovq.hf.rows import Rows
from ovq.hf.streaming import Sampling, stream_text, stream_tokens
from tests.hf.common import make_model, random_ids

PROMPT = random_ids(1, 11)[0].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.5, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 0.8},
    ],
    ids=str,
)
def test_tokens_are_those_of_generate(model, options):
    sampling = Sampling(**options)
    torch.manual_seed(3)
    expected = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, pad_token_id=0, **sampling.options)
    generator = torch.Generator().manual_seed(3)
    found = list(islice(stream_tokens(model, PROMPT, sampling=sampling, generator=generator), 8))
    assert found == expected[0, len(PROMPT) :].tolist()


@torch.no_grad()
def test_a_config_may_ask_for_tuples():
    plain, tuples = make_model(), make_model(return_dict=False)
    ids = torch.tensor([PROMPT])
    assert torch.equal(tuples(ids)[0], plain(ids).logits)
    found, expected = (list(islice(stream_tokens(model, PROMPT), 8)) for model in (tuples, plain))
    assert found == expected
    found, expected = (Rows.start(model).read([PROMPT]) for model in (tuples, plain))
    assert torch.equal(found, expected)


def test_every_option_changes_what_is_said():
    model = make_model()

    def tokens(**options):
        generator = torch.Generator().manual_seed(0)
        return list(
            islice(stream_tokens(model, PROMPT, sampling=Sampling(**options), generator=generator), 20)
        )

    plain = tokens(temperature=2.0)
    for options in ({"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}, {"repetition_penalty": 3.0}):
        assert tokens(temperature=2.0, **options) != plain


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature):
    model = make_model()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match="logits: expected finite numbers, found NaN or Inf"):
        next(stream_tokens(model, PROMPT, sampling=Sampling(temperature=temperature)))


def test_a_stream_ends_after_the_last_token_of_a_text(model):
    endless = list(islice(stream_tokens(model, PROMPT), 12))
    end = endless[7]
    assert list(stream_tokens(model, PROMPT, eos_token_id=end)) == endless[: endless.index(end) + 1]
    assert list(stream_tokens(model, PROMPT, eos_token_id=[end])) == endless[: endless.index(end) + 1]


def test_a_prompt_in_pieces_and_after_a_document(model):
    expected = list(islice(stream_tokens(model, PROMPT), 10))
    assert list(islice(stream_tokens(model, PROMPT, prefill_chunk_size=3), 10)) == expected
    assert list(islice(stream_tokens(model, PROMPT, prefill_chunk_size=2**64), 10)) == expected
    context = build_context(model, PROMPT[:6])
    assert list(islice(stream_tokens(model, PROMPT[6:], cache=context.cache()), 10)) == expected


def test_the_state_is_all_that_a_stream_keeps():
    def tensors():
        gc.collect()
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    # What other tests have left: it may go in between, and some of it has no size, being of a graph.
    others = tensors()
    known = {id(tensor) for tensor in others}

    def kept():
        return sum(tensor.nbytes for tensor in tensors() if id(tensor) not in known)

    # All slots from the start, so that the state itself has its size.
    model = make_model(mixer_types=["sliding_attention", "ovq"], num_hidden_layers=2, growth="immediate")
    stream = stream_tokens(model, PROMPT, sampling=Sampling(repetition_penalty=1.3))
    list(islice(stream, 20))
    before = kept()
    list(islice(stream, 100))
    assert kept() == before
    del others


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, r"temperature: expected 0, or from 1e-06 to 1e\+06, found -1"),
        ({"temperature": 1e-300}, r"temperature: expected 0, or from 1e-06 to 1e\+06, found 1e-300"),
        ({"temperature": 1e39}, r"temperature: expected 0, or from 1e-06 to 1e\+06, found 1e\+39"),
        ({"temperature": 1, "top_k": -1}, "top_k: expected at least 0"),
        ({"top_p": 0}, "top_p: expected a number above 0"),
        ({"temperature": 1, "min_p": 2}, "min_p: expected a number from 0 to 1"),
        ({"repetition_penalty": 0}, r"repetition_penalty: expected from 1e-06 to 1e\+06, found 0"),
        ({"repetition_penalty": 1e39}, r"repetition_penalty: expected from 1e-06 to 1e\+06"),
        ({"top_k": 5}, "top_k: expected a temperature above 0"),
        ({"min_p": 0.1}, "min_p: expected a temperature above 0"),
        ({"top_p": 0.5}, "top_p: expected a temperature above 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [1, 10**6]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids"),
        ({"input_ids": [1], "prefill_chunk_size": 0}, "prefill_chunk_size"),
    ],
)
def test_prompts_that_cannot_be_read(model, arguments, message):
    with pytest.raises(ValueError, match=f"{message}: expected"):
        next(stream_tokens(model, **arguments))


LETTERS = byte_tokenizer()
CHARACTERS = st.text("aé€😀\ufffd ", max_size=12).map(str.encode)
PARTS = st.one_of(CHARACTERS, st.binary(max_size=12), st.just(b"\xff" * 9), st.just("😀".encode()[:3]))


@given(st.lists(PARTS, max_size=6))
def test_pieces_of_any_bytes_make_the_text(parts):
    ids = list(b"".join(parts))
    pieces = list(stream_text(ids, LETTERS))
    assert "".join(pieces) == LETTERS.decode(ids)
    assert all(pieces)


def test_characters_come_with_their_last_byte():
    seen = []

    def tokens():
        for byte in "a€b".encode():
            yield byte
            seen.append("|")

    for piece in stream_text(tokens(), LETTERS):
        seen.append(piece)
    assert "".join(seen) == "a|||€|b|"


def test_special_tokens_are_not_printed():
    assert list(stream_text([*b"ab", *[256] * 20, *b"c"], LETTERS)) == ["a", "b", "c"]


def test_what_is_decoded_for_a_token_is_bounded():
    class Counting:
        longest = 0

        def decode(self, ids, **options):
            self.longest = max(self.longest, len(ids))
            return LETTERS.decode(ids, **options)

    counting = Counting()
    stream = [*b"text " * 100, *b"\xff" * 300, *[256] * 50, *"😀".encode() * 50]
    assert "".join(stream_text(stream, counting)) == LETTERS.decode(stream, skip_special_tokens=True)
    assert counting.longest <= 16


def test_a_word_after_the_prompt_keeps_its_space():
    words = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1}, unk_token="▁one"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([0, 1]) == "one two"
    assert list(stream_text([1, 0], tokenizer, prompt=[0])) == [" two", " one"]
    assert list(stream_text([1, 0], tokenizer)) == ["two", " one"]
