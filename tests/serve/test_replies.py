"""Tokens in answers: their bytes give the text, and it is said where in it they are."""

import asyncio
import dataclasses

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ovq.serve.answers import Piece, Usage, pieces
from ovq.serve.jobs import BeginEvent, Generation, TokenEvent, TokenLogprobs
from ovq.serve.replies import ChatForm, CompletionForm, whole
from ovq.serve.texts import Texts
from ovq_lab.text import Document, byte_tokenizer, train_tokenizer

TEXT = "né €5 \U0001f600 été, né né \ufffd 漢字"


def pairs():
    """Byte pairs, some of which end within a character."""
    return train_tokenizer(
        [Document(name="a", text="né \U0001f601\U0001f602 été 漢漢 €€ " * 9)], vocab_size=270
    )


def characters():
    """As sentencepiece makes them: a space belongs to the next word, unknown characters become bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {name: place for place, name in enumerate([*names, "<s>", "▁", "n", "é", "▁n", "▁né", "5"])}
    merges = [("▁", "n"), ("▁n", "é")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def words():
    """As BERT writes: whole words, and what follows within one."""
    names = ["[UNK]", "so", "##me", "words", "##\ufffd"]
    tokenizer = Tokenizer(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


class Answers:
    """What a model says, without one."""

    def __init__(self, tokens, end=None, reason="stop"):
        self._tokens, self._end, self._reason = tokens, end, reason

    async def events(self):
        found = []
        for token in self._tokens:
            logprobs = TokenLogprobs(logprob=-1.0, top=[(token, -1.0)])
            found.append(TokenEvent(choice=0, token=token, logprobs=logprobs))
        if self._end is not None:
            logprobs = TokenLogprobs(logprob=-2.0, top=[])
            found.append(TokenEvent(choice=0, token=self._end, is_end=True, logprobs=logprobs))
        found[-1] = dataclasses.replace(found[-1], finish_reason=self._reason)
        for event in found:
            yield event

    def cancel(self, *, choice=None):
        pass


def answered(form_of, tokenizer, prompt, tokens, *, end=None):
    """The choice of a complete answer."""
    texts = Texts(tokenizer, vocab_size=500)
    job = Generation(tokens=prompt, deliver=print, max_tokens=99, choices=range(1))
    found = pieces(Answers(tokens, end), [job], texts, [], Usage())
    answer = asyncio.run(whole(found, form_of(texts), [0], Usage(), model="m"))
    return answer["choices"][0]


KINDS = {"bytes": byte_tokenizer, "pairs": pairs, "characters": characters}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_the_bytes_of_tokens_are_those_of_the_text(make):
    tokenizer = make()
    prompt, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("né", f"né {TEXT}"))
    tokens = tokens[len(prompt) :]
    choice = answered(ChatForm, tokenizer, prompt, tokens, end=tokenizer.eos_token_id)
    content = choice["logprobs"]["content"]
    assert choice["message"]["content"] == f" {TEXT}"
    found = [bytes(one["bytes"]) for one in content]
    assert b"".join(found).decode() == f" {TEXT}"
    assert found[-1] == b"" != content[-1]["token"]
    # Parts of characters are among them, as themselves.
    is_part = [one.decode(errors="ignore").encode() != one for one in found]
    assert sum(is_part) > 3
    for one, raw in zip(content[:-1], found, strict=False):
        assert one["token"] == raw.decode(errors="replace")
        assert [top["bytes"] for top in one["top_logprobs"]] == [one["bytes"]]


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_any_bytes_are_given_as_they_are(make):
    """Models say what is no text, too."""
    tokenizer, raw = make(), bytes([255, 97, 0xE2, 0x82, 97, 0xC3, 0xA9, 0xA9])
    tokens = (
        [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in raw] if make is characters else list(raw)
    )
    content = answered(ChatForm, tokenizer, tokens[:1], tokens)["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content) == raw


def test_tokens_that_are_text_keep_what_joins_them():
    tokenizer = words()
    content = answered(ChatForm, tokenizer, [1], [2, 3, 4, 0, 3])["logprobs"]["content"]
    assert [bytes(one["bytes"]).decode() for one in content] == ["me", " words", "\ufffd", "", " words"]


@pytest.mark.parametrize("make", [*KINDS.values(), lambda: None], ids=[*KINDS, "ids"])
def test_offsets_are_places_in_the_text(make):
    tokenizer = make()
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"] if tokenizer else [12, 7, 33, 5]
    choice = answered(CompletionForm, tokenizer, tokens[:1], tokens[1:])
    text, logprobs = choice["text"], choice["logprobs"]
    assert len(logprobs["tokens"]) == len(tokens) - 1
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if "\ufffd" not in token:
            assert text[offset:].startswith(token)
    if tokenizer:
        # Parts of a character are where it is.
        assert TEXT.endswith(text)
        assert logprobs["text_offset"].count(text.index("字")) == 3
    else:
        assert (text, logprobs["text_offset"]) == ("7 33 5", [0, 2, 5])


@pytest.mark.parametrize(
    ("raw", "offsets"),
    [
        (b"\xd7hi", [0, 1, 2]),
        (b"a\xe2\x82b\xc3\xa9", [0, 1, 1, 2, 3, 3]),
        (b"\xe2\xe2\x82\xac", [0, 1, 1, 1]),
        # The second byte can follow no such first one; a replacement character that was meant.
        (b"\xe0\x80a", [0, 1, 2]),
        (b"\xef\xbf\xbda", [0, 0, 0, 1]),
        (b"\xff\xff", [0, 1]),
        # Half a surrogate is replaced byte by byte.
        (b"\xed\xa0A", [0, 0, 2]),
    ],
)
def test_offsets_after_a_broken_character(raw, offsets):
    choice = answered(CompletionForm, byte_tokenizer(), [97], list(raw))
    assert choice["text"] == raw.decode(errors="replace")
    assert choice["logprobs"]["text_offset"] == offsets


def test_a_stop_sequence_may_come_when_an_answer_ends():
    """What was held back as part of a character becomes text."""
    texts, job = Texts(byte_tokenizer(), vocab_size=500), Generation(tokens=[97], deliver=print, max_tokens=2)
    found = pieces(Answers([98, 0xE2], reason="length"), [job], texts, ["\ufffd"], Usage())
    answer = asyncio.run(whole(found, ChatForm(texts), [0], Usage(), model="m"))["choices"][0]
    assert (answer["message"]["content"], answer["finish_reason"]) == ("b", "stop")


def test_of_tokens_with_the_same_text_the_likeliest_counts():
    logprobs = TokenLogprobs(logprob=-1.0, top=[(0xE2, -1.0), (0xF0, -2.0)])
    event = TokenEvent(choice=0, token=0xE2, logprobs=logprobs)
    form = CompletionForm(Texts(byte_tokenizer(), vocab_size=500))
    found = form.chunk(Piece(choice=0, text="", events=[event]))["logprobs"]
    assert found["top_logprobs"] == [{"\ufffd": -1.0}]


def test_known_tokens_of_all_prompts_are_added_up():
    class Events(Answers):
        async def events(self):
            for choice in (0, 1):
                yield BeginEvent(num_known=16 + choice)
                yield TokenEvent(choice=choice, token=1, finish_reason="length")

    texts, usage = Texts(None, vocab_size=500), Usage()
    jobs = [Generation(tokens=[1], deliver=print, max_tokens=2, choices=(choice,)) for choice in (0, 1)]
    found = pieces(Events([]), jobs, texts, [], usage)
    asyncio.run(whole(found, CompletionForm(texts), [0, 1], usage, model="m"))
    assert usage.fields["prompt_tokens_details"] == {"cached_tokens": 33}
