"""Prompts: what of them is read before they are known."""

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ovq.prompts
from ovq.prompts import chat_ids, document_ids, encode, ids_after

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}\n{{ m.content }}{% endfor %}"


@pytest.mark.parametrize("message", ["a", "\nb", "\n\n1", " (b", "sb"])
def test_a_document_ends_before_tokens_that_a_message_may_join(message):
    """A line end before a message is one token with those that the message begins with."""
    letters = {letter: i for i, letter in enumerate(["\n", *" (1abdsu", "\n\n", "\n ("])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            models.BPE(vocab=letters | {" (": 11}, merges=[("\n", "\n"), (" ", "("), ("\n", " (")])
        )
    )
    tokenizer.chat_template = TEMPLATE
    about = {"vocab_size": 12, "name": "text"}
    ids, messages = document_ids("bad", tokenizer, **about)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "s\nbadu"
    prompt = chat_ids([*messages, {"role": "user", "content": message}], tokenizer, **about)
    assert prompt[: len(ids)] == ids


def test_a_document_is_in_a_template_that_begins_with_spaces():
    """This tokenizer makes no token of what stands before the only special one."""
    words = Tokenizer(
        models.WordLevel({x: i for i, x in enumerate(["?", "the", "cat", "system", "user", ":", "a"])}, "?")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    tokenizer.chat_template = "\n<s>{% for m in messages %} {{ m.role }} : {{ m.content }} {% endfor %}user :"
    ids, messages = document_ids("the cat", tokenizer, vocab_size=20, name="text")
    assert tokenizer.convert_ids_to_tokens(ids)[:5] == ["<s>", "system", ":", "the", "cat"]
    assert messages == [{"role": "system", "content": "the cat"}]


@pytest.mark.parametrize("is_stripped", [False, True])
def test_a_document_before_a_special_token_is_tokenized_twice(is_stripped, monkeypatch):
    """Once to be read, and once to check it, as this tokenizer may drop spaces before special tokens."""
    letters = {letter: i for i, letter in enumerate(" (1abdsu\n")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=letters, merges=[])))
    tokenizer.add_special_tokens({"eos_token": AddedToken("<e>", lstrip=is_stripped)})
    tokenizer.chat_template = TEMPLATE.replace("{% endfor", "<e>{% endfor")
    lengths, about = [], {"vocab_size": 10, "name": "text"}

    def counted(text, *arguments, **options):
        lengths.append(len(text))
        return encode(text, *arguments, **options)

    monkeypatch.setattr(ovq.prompts, "encode", counted)
    ids, messages = document_ids("bad " * 1000, tokenizer, **about)
    assert sum(length > 4000 for length in lengths) == (6 if is_stripped else 2)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).startswith("s\n" + ("bad " * 1000).rstrip())
    assert tokenizer.convert_ids_to_tokens(ids[-3:]) == ["<e>", "u", "\n"]
    prompt = chat_ids([*messages, {"role": "user", "content": "1"}], tokenizer, **about)
    assert prompt[: len(ids)] == ids


@pytest.mark.parametrize("ids", [[5, 6], [5, 7, 8], [5]], ids=str)
def test_a_chat_must_go_on_from_what_a_context_has_read(ids):
    with pytest.raises(ValueError, match="--prompt: expected messages that go on from those of the context"):
        ids_after([5, 6], ids, name="--prompt")
