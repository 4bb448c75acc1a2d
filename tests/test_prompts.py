"""Prompts: what of them is read before they are known."""

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ovq.prompts import chat_ids, document_ids

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
