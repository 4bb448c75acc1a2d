"""The text of each token."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ovq.inspect import inspect_text, token_pieces
from ovq_lab.text import byte_tokenizer
from tests.inspect.common import looked_into


def test_characters_of_several_bytes_belong_to_their_first_token():
    tokenizer, text = byte_tokenizer(), "a\u00e4\u20ac\n\x00b \U0001f600."
    ids = tokenizer(text)["input_ids"]
    pieces = token_pieces(text, ids, tokenizer)
    assert len(pieces) == len(ids) == len(text.encode())
    assert "".join(pieces) == text
    assert pieces[:6] == ["a", "\u00e4", "", "\u20ac", "", ""]


def words(**options):
    ids = {word: i for i, word in enumerate(["<s>", "one", "two", " ."])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **options)


def test_spaces_that_a_tokenizer_drops_and_marks_that_it_adds_are_shown():
    tokenizer = words()
    ids = tokenizer("one  two one")["input_ids"]
    assert token_pieces("one  two one", ids, tokenizer) == ["<s>", "one", "  two", " one"]
    # The beginning of a text.
    assert token_pieces("one  two one", ids[:3], tokenizer) == ["<s>", "one", "  two"]
    assert token_pieces("one two", [1, 2], tokenizer) == ["one", " two"]
    # A mark that stands in the text is shown once.
    ids = tokenizer("one <s> two")["input_ids"]
    assert token_pieces("one <s> two", ids, tokenizer) == ["<s>", "one", " <s>", " two"]
    # Not the ids of this text: each is decoded by itself.
    assert token_pieces("two", [1, 2], tokenizer) == ["one", "two"]
    assert token_pieces("two", [1, 3], words(clean_up_tokenization_spaces=True)) == ["one", " ."]


def test_token_ids_are_their_own_text():
    assert token_pieces("3 14", [3, 14], None) == ["3", "14"]


def test_a_text_is_cut_and_says_so():
    told = []
    work = SimpleNamespace(update=told.append)
    found = looked_into(list("abcdefghij"), max_tokens=7, num_hidden_layers=4, work=work)
    # Tokens are counted layer by layer.
    assert told == [4, 7, 11, 14]
    found = looked_into(list("abcdefghij"), max_tokens=7)
    assert (found.num_tokens, found.num_given, found.pieces) == (7, 10, list("abcdefg"))
    assert found.layer(None).layer == found.layer(1).layer == 1
    with pytest.raises(ValueError, match="expected an OVQ layer, one of 1, found 0"):
        found.layer(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pieces": []}, "expected at least one token and a piece for each, found 0"),
        ({"pieces": ["a"], "max_tokens": 0}, "max_tokens: expected 1 to 16,384, found 0"),
        ({"pieces": ["a"], "num_reads": 0}, "num_reads: expected an integer of at least 1, found 0"),
        ({"pieces": ["a"], "num_slots": 40_000}, "num_slots: expected at most 32,767, found 40,000"),
        ({"pieces": ["a"], "mixer_types": ["full_attention"] * 2}, "expected a model with 'ovq' layers"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        looked_into(**arguments)


def test_every_token_needs_a_piece():
    with pytest.raises(ValueError, match="found 2 and 1 pieces"):
        inspect_text(None, [1, 2], ["a"])
    with pytest.raises(ValueError, match="expected at least one token and a piece for each, found 2 and 1"):
        inspect_text(None, torch.tensor([1, 2]), ["a"])
