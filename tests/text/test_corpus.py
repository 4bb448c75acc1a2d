"""Corpora as tokens: splits, volumes, and the cache they are kept in."""

import itertools
import os
import tracemalloc

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ovq_lab.eval.language import take_windows
from ovq_lab.eval.reading import token_bytes
from ovq_lab.tasks import TextTask
from ovq_lab.text import TextSource, byte_tokenizer, corpus, load_corpus, split_of, train_tokenizer
from ovq_lab.text.documents import Document
from ovq_lab.train.text import HeldOutWindows

TEXTS = {f"{i:02}.txt": f"{i} " * (i + 1) for i in range(40)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ovq" / "text"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    return folder


def source_of(folder, **fields):
    return TextSource(dataset=str(folder), **({"held_out": 0.5} | fields))


def texts(loaded):
    return [bytes(tokens).decode() for tokens in loaded]


def test_every_document_is_whole_and_in_one_split(folder):
    found = {}
    for split in ("train", "validation", "test"):
        loaded = load_corpus(source_of(folder), split)
        assert loaded.names == [name for name in TEXTS if split_of(name, held_out=0.5) == split]
        assert len(loaded) > 3
        found |= dict(zip(loaded.names, texts(loaded), strict=True))
        assert loaded.num_bytes.tolist() == [len(TEXTS[name]) for name in loaded.names]
        assert loaded.num_tokens.tolist() == loaded.num_bytes.tolist()
    assert found == TEXTS
    assert texts(load_corpus(source_of(folder), "all")) == list(TEXTS.values())


def test_ids_that_a_tokenizer_leaves_out_are_counted(folder, tmp_path):
    """With fewer tokens than 2 ** 8 and ids beyond, tokens still need two bytes."""
    words = {"<end>": 0} | {str(number): 300 + number for number in range(40)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<end>")), eos_token="<end>"
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save_pretrained(tmp_path / "gaps")
    assert TextTask(dataset=str(folder), tokenizer=str(tmp_path / "gaps")).vocab_size == 340
    loaded = load_corpus(source_of(folder, tokenizer=str(tmp_path / "gaps")), "all")
    assert [set(tokens.tolist()) for tokens in loaded] == [{300 + number} for number in range(40)]
    assert token_bytes(tokenizer)[[0, 299, 300, 339]].tolist() == [0, 0, 2, 3]  # with a space each


def test_volumes_are_joined_within_a_split(folder):
    alone = load_corpus(source_of(folder), "train")
    joined = load_corpus(source_of(folder, join_to=100), "train")
    assert 1 < len(joined) < len(alone)
    assert min(joined.num_bytes) >= 100
    assert "\n\n".join(texts(joined)) == "\n\n".join(texts(alone))
    assert [len(text) for text in texts(joined)] == joined.num_bytes.tolist() == joined.num_tokens.tolist()
    first = joined.names[0].split("..")
    assert first[0] == alone.names[0]
    assert first[1] in alone.names
    # A document that is long enough is not joined to others.
    assert load_corpus(source_of(folder, join_to=1), "train").names == alone.names
    # One volume takes all that there is.
    assert len(load_corpus(source_of(folder, join_to=10**6), "train")) == 1


def test_a_part_of_a_volume_is_read_alone(folder):
    for fields in ({}, {"join_to": 100}):
        loaded = load_corpus(source_of(folder, **fields), "train")
        for i, whole in enumerate(loaded):
            for start, stop in itertools.combinations_with_replacement(range(len(whole) + 4), 2):
                assert np.array_equal(loaded.tokens(i, start, stop), whole[start:stop])


def bytes_copied(read):
    """The most bytes that arrays have taken at once."""
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_windows_of_a_volume_copy_no_more_than_they_hold(folder):
    for name in TEXTS:
        (folder / name).write_text(name * 10_000)
    [whole] = joined = load_corpus(source_of(folder, join_to=10**9), "train")
    assert len(whole) > 10**6
    held_out = HeldOutWindows(joined, length=100, num_windows=5)
    assert bytes_copied(lambda: held_out.__getitems__(range(5))) < 10**5
    assert bytes_copied(lambda: take_windows(joined, 100, 5, first_token=0)) < 10**5


def test_other_tokenizers_count_bytes_as_well(folder, tmp_path):
    tokenizer = train_tokenizer([Document(name=name, text=text) for name, text in TEXTS.items()], 300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    by_name = load_corpus(source_of(folder, tokenizer=str(tmp_path / "tokenizer"), join_to=100), "train")
    given = load_corpus(source_of(folder, join_to=100), "train", tokenizer=tokenizer)
    assert given.end_of_text == tokenizer.eos_token_id == 299
    for one, other in zip(by_name, given, strict=True):
        assert np.array_equal(one, other)
        assert one.dtype == np.uint16
    in_bytes = load_corpus(source_of(folder, join_to=100), "train")
    assert given.num_bytes.tolist() == in_bytes.num_bytes.tolist()
    assert given.num_tokens.sum() < in_bytes.num_tokens.sum()
    assert [tokenizer.decode(tokens.tolist()) for tokens in given] == texts(in_bytes)


def test_a_corpus_is_read_once(folder, cache, monkeypatch):
    read = []
    load_corpus(source_of(folder), "train", progress=read.append)
    assert read == [32, 40]
    monkeypatch.setattr(corpus, "_store", lambda *_: pytest.fail("encoded again"))
    one, same = (load_corpus(source_of(folder), "train") for _ in range(2))
    others = [load_corpus(source_of(folder, join_to=n), split) for n, split in ((50, "train"), (0, "test"))]
    assert one.digest == same.digest
    assert len({corpus.digest for corpus in (one, *others)}) == 3
    # Splits and volumes are views of the same tokens, and a saved tokenizer of bytes is one of bytes.
    load_corpus(source_of(folder, held_out=0.1, join_to=50), "all", tokenizer=byte_tokenizer())
    (kept,) = (path for path in cache.iterdir() if path.is_dir())
    assert (kept / "tokens.bin").stat().st_size == sum(map(len, TEXTS.values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "00.txt").write_text("something else"),
        # As long as it was.
        lambda folder: (folder / "00.txt").write_text(TEXTS["00.txt"].upper().replace("0", "1")),
        lambda folder: (folder / "40.txt").write_text("one more"),
        lambda folder: (folder / "00.txt").rename(folder / "0.txt"),
    ],
)
def test_a_corpus_that_has_changed_is_read_again(folder, change):
    before = load_corpus(source_of(folder), "all")
    change(folder)
    after = load_corpus(source_of(folder), "all")
    assert dict(zip(after.names, texts(after), strict=True)) == {
        path.name: path.read_text() for path in folder.iterdir()
    }
    assert after.digest != before.digest
    # What is in use stays what it was.
    assert texts(before) == list(TEXTS.values())


def test_the_cache_holds_a_whole_corpus_or_none(folder, cache, monkeypatch):
    encode = corpus.encode_bytes
    monkeypatch.setattr(corpus, "encode_bytes", lambda text: 1 / 0 if text.startswith("39") else encode(text))
    with pytest.raises(ZeroDivisionError):
        load_corpus(source_of(folder), "all")
    assert not [path for path in cache.iterdir() if path.is_dir()]
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent.parent))
    assert len(load_corpus(source_of(folder), "all")) == len(TEXTS)


def test_names_of_files_need_not_be_utf8(folder, cache):
    try:
        os.rename(folder / "00.txt", os.fsencode(folder) + b"/\xff.txt")
    except OSError:
        pytest.skip("the file system takes no such names")
    corpus = load_corpus(source_of(folder), "all")
    assert os.fsdecode(b"\xff.txt") in corpus.names


def test_no_more_is_read_than_asked_for(folder):
    assert load_corpus(source_of(folder, max_documents=3), "all").names == list(TEXTS)[:3]


def test_a_split_without_documents_is_refused(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("all there is")
    message = r"expected documents for test in .*, found none among its 1 \(held_out=0.0\)"
    with pytest.raises(ValueError, match=message):
        load_corpus(TextSource(dataset=str(path), held_out=0), "test")
    with pytest.raises(ValueError, match="split: expected one of train, validation, test, all, found 'dev'"):
        load_corpus(TextSource(dataset=str(path)), "dev")
    path.write_text("")
    with pytest.raises(ValueError, match="expected at least one document that is not empty"):
        load_corpus(TextSource(dataset=str(path)), "all")


def test_two_documents_of_one_name_are_refused(folder):
    with pytest.raises(ValueError, match=r"expected unique names of documents, found '00.txt' twice"):
        load_corpus(source_of(f"{folder}+{folder}"), "all")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dataset": ""}, "dataset: expected a name, found none"),
        ({"held_out": 1.0}, r"held_out: expected a share in \[0, 1\), found 1.0"),
        ({"join_to": -1}, "join_to: expected at least 0, found -1"),
        ({"max_documents": 0}, "max_documents: expected at least 1, found 0"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TextSource(**({"dataset": "sotu"} | fields))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("index.json", lambda data: data[:-9], "expected JSON, found invalid JSON"),
        ("index.json", lambda data: b"[]", "list indices"),
        ("index.json", lambda data: data.replace(b"sha256", b"sha255"), "'sha256'"),
        ("tokens.bin", lambda data: data[:-1], "expected 2405 tokens, found 2404"),
        ("tokens.bin", lambda data: b"", "cannot mmap an empty file|expected 2405 tokens"),
    ],
)
def test_a_damaged_corpus_in_the_cache_is_named(folder, cache, name, damage, reason):
    load_corpus(source_of(folder), "train")
    [path] = cache.glob(f"*/{name}")
    path.write_bytes(damage(path.read_bytes()))
    message = rf"{path.parent}: expected a cached corpus, found a damaged one \(.*({reason}).*\)"
    with pytest.raises(ValueError, match=message):
        load_corpus(source_of(folder), "train")
