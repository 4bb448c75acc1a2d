"""Tokenizers that threads share; stop sequences, against the plain definition: the text up to the first."""

import copy
import threading

from hypothesis import example, given
from hypothesis import strategies as st

from ovq.serve import texts
from ovq.serve.texts import StopSequences, Texts
from ovq_lab.text import byte_tokenizer

LETTERS = st.text(alphabet="ab", max_size=30)


@given(
    pieces=st.lists(LETTERS, max_size=8), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
)
@example(pieces=["aab"], stops=["ab", "aab"])
def test_text_ends_before_the_first_stop_sequence(pieces, stops):
    found, shown = StopSequences(stops), ""
    for piece in pieces:
        shown += found.push(piece)
        if found.is_stopped:
            break
    else:
        shown += found.finish()
    text = "".join(pieces)
    # A sequence ends an answer when its last letter has come, so which is first depends on its end.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert found.is_stopped == bool(ends)
    if not ends:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
        assert any(text.startswith(stop, len(shown)) for stop in stops)


@given(text=LETTERS)
def test_only_what_may_become_a_stop_sequence_is_held_back(text):
    found = StopSequences(["abb"])
    shown = "".join(found.push(letter) for letter in text)
    if not found.is_stopped:
        held = text[len(shown) :]
        assert held in ("", "a", "ab")
        assert "abb".startswith(held)
        assert shown + found.finish() == text


def test_short_texts_do_not_wait_for_long_ones(monkeypatch):
    tokenizer, own = byte_tokenizer(), copy.deepcopy(byte_tokenizer())
    shared = Texts(tokenizer, vocab_size=257)
    is_begun, may_end, encode = threading.Event(), threading.Event(), texts.encode

    def slow(text, tokenizer, **about):
        if len(text) > 2:
            is_begun.set()
            assert may_end.wait(30)
        return encode(text, tokenizer, **about)

    monkeypatch.setattr(texts, "encode", slow)
    found = []
    text = "abc"
    about = {"param": "p", "is_start": True}
    thread = threading.Thread(target=lambda: found.append(shared.encode(text, is_long=True, **about)))
    thread.start()
    assert is_begun.wait(30)
    assert shared.encode("ab", **about) == own("ab")["input_ids"]
    may_end.set()
    thread.join()
    assert found == [own(text)["input_ids"]]


def test_the_bytes_of_a_token_are_looked_up_once(monkeypatch):
    asked = []
    monkeypatch.setattr(texts, "token_bytes", lambda tokenizer, token: asked.append(token) or bytes([token]))
    shared = Texts(byte_tokenizer(), vocab_size=257)
    assert [shared.token_bytes(token) for token in (1, 2, 1, 2)] == [b"\1", b"\2", b"\1", b"\2"]
    assert asked == [1, 2]
