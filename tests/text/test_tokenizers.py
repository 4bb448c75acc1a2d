"""Tokenizers of bytes and of byte pairs: what they give, what comes back, and what is saved of them."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from ovq_lab.text import (
    Document,
    TextSource,
    byte_tokenizer,
    encode_bytes,
    get_tokenizer,
    source_tokenizer,
    split_of,
    tokenizers,
    train_tokenizer,
)
from ovq_lab.text.tokenizers import is_byte_tokenizer
from tests.disks import full_disk

BYTES = byte_tokenizer()
# Surrogates have no bytes in UTF-8.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


@given(text=TEXTS)
def test_tokens_are_the_bytes_and_come_back(text):
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert ids == encode_bytes(text).tolist()
    assert BYTES.decode(ids) == text


@given(data=st.binary(max_size=20))
def test_bytes_that_are_no_text_are_marked(data):
    assert BYTES.decode(list(data)) == data.decode(errors="replace")


def test_every_byte_has_its_token():
    assert [BYTES.decode([byte]) for byte in range(128)] == [chr(byte) for byte in range(128)]
    assert sorted(BYTES.get_vocab().values()) == list(range(257))


def test_a_text_cannot_spell_its_end():
    text = f"before {BYTES.eos_token} after"
    assert BYTES.eos_token_id == 256
    assert 256 not in BYTES(text)["input_ids"]
    assert BYTES.decode([104, 105, 256], skip_special_tokens=True) == "hi"


def test_half_a_surrogate_pair_is_a_question_mark():
    assert bytes(encode_bytes("a\ud800b")) == b"a?b"


@pytest.mark.parametrize("make", [byte_tokenizer, lambda: train_tokenizer(AGAIN, 270)])
def test_what_is_saved_is_the_same(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), get_tokenizer(str(tmp_path))):
        text = "again, né <|endoftext|>  x"
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert loaded.eos_token_id == len(loaded) - 1
        assert is_byte_tokenizer(loaded) == (make is byte_tokenizer)


AGAIN = [Document(name="a", text="again and again and again")]


def test_pairs_are_learned_and_anything_can_be_said():
    tokenizer = train_tokenizer(AGAIN, 270)
    assert len(tokenizer) <= 270
    ids = tokenizer("again and again")["input_ids"]
    assert len(ids) == 3
    strange = "Zürich ☃\n\n\t x "
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange
    # Bytes keep their tokens, as without pairs.
    assert tokenizer("☃")["input_ids"] == list("☃".encode())
    assert len(set(tokenizer.get_vocab().values())) == len(tokenizer)
    assert tokenizer.get_vocab() == train_tokenizer(AGAIN, 270).get_vocab()


def test_a_tokenizer_is_trained_once_and_on_the_training_documents_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in map("{}.txt".format, range(6)):
        is_trained_on = split_of(name, held_out=0.5) == "train"
        (folder / name).write_text("again and again" if is_trained_on else "zebra zebra zebra zebra")
    source = TextSource(dataset=str(folder), tokenizer="bpe:300", held_out=0.5)
    tokens = source_tokenizer(source).get_vocab()
    assert "again" in tokens
    assert not any("ze" in token for token in tokens)
    with monkeypatch.context() as patched:
        patched.setattr(tokenizers, "train_tokenizer", lambda *_: pytest.fail("trained again"))
        assert source_tokenizer(source).get_vocab() == tokens
    # Another share of held-out documents is another tokenizer.
    everything = source_tokenizer(dataclasses.replace(source, held_out=0.0)).get_vocab()
    assert any("ze" in token for token in everything)


def test_a_tokenizer_for_which_the_disk_has_no_room_is_an_error_of_writing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("again and again")
    source = TextSource(dataset=str(tmp_path / "text.txt"), tokenizer="bpe:300", held_out=0.0)
    with full_disk(2000), pytest.raises(OSError, match=r"cannot be written \(.*File too large"):
        source_tokenizer(source)


def test_a_tokenizer_is_trained_on_so_much_text_and_no_more(monkeypatch):
    monkeypatch.setattr(tokenizers, "_TRAINING_BYTES", 10)
    texts = [Document(name=str(i), text="abcdef") for i in range(5)]
    assert [d.name for d in tokenizers._first_bytes(texts)] == ["0", "1"]


def test_unknown_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: expected bytes, bpe:N, the folder of .*, found"):
        get_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="vocab_size: expected at least 257, found 256"):
        train_tokenizer(AGAIN, 256)


@pytest.mark.parametrize("name", ["bpe:", "bpe:many", "bpe:100"])
def test_a_size_that_cannot_be_is_refused(name):
    with pytest.raises(ValueError, match=rf"tokenizer: expected bpe:N with N of at least 257, .*'{name}'"):
        TextSource(dataset="sotu", tokenizer=name)
