"""Windows with needles: what is in them, when they are shown, and that a run trains on them."""

import itertools
import re

import numpy as np
import pytest
import torch
from tests.train.text_common import END, quiet, tiny_config, write_texts

from ovq_lab.tasks import IGNORE_INDEX, TextTask
from ovq_lab.tasks.text import SHORTEST_NEEDLE_TEXT
from ovq_lab.text import TextSource, byte_tokenizer, load_corpus
from ovq_lab.text.haystack import NeedleBuilder
from ovq_lab.train import loop
from ovq_lab.train.needles import NeedleWindows
from ovq_lab.train.text import PackedTextDataset

BYTES = byte_tokenizer()
NEEDLE = r"One of the special magic (?:number|word)s for (\S+) is: ([^.]+)\."
WINDOW = 1200


@pytest.fixture
def folder(tmp_path, monkeypatch):
    text = " ".join(f"This is sentence {i}." for i in range(400))
    return write_texts(tmp_path, monkeypatch, {"a.txt": text})


@pytest.fixture
def corpus(folder):
    return load_corpus(TextSource(dataset=str(folder), held_out=0), "train")


def config_of(folder, share=1.0, **train):
    fields = {"lengths": (WINDOW,), "steps": 10, "batch_size": 2} | train
    return tiny_config(folder, task={"needle_share": share}, **fields)


def windows_of(folder, corpus, share=1.0, **train):
    return NeedleWindows(config_of(folder, share, **train), corpus, BYTES)


@pytest.mark.parametrize("value", ["number", "word"])
def test_every_needle_is_said_twice_and_the_second_time_at_the_end(value):
    builder = NeedleBuilder(BYTES, haystack="essay", value=value, texts=["Some words. And others. " * 50])
    orders = set()
    for seed in range(20):
        ids, is_answer = builder.repeat(1500, num_needles=4, random=np.random.default_rng(seed))
        assert 1500 - len(" And others.") < len(ids) <= 1500
        hay, *again = BYTES.decode(ids).split("\n")
        first, second = (re.findall(NEEDLE, text) for text in (hay, "\n".join(again)))
        assert len(again) == len(first) == len(set(first)) == 4
        assert all(re.fullmatch(NEEDLE, line) for line in again)
        assert sorted(first) == sorted(second)
        assert BYTES.decode(ids[is_answer]) == "".join(f" {value}" for _, value in second)
        assert not is_answer[: len(hay)].any()
        keys, values = zip(*first, strict=True)
        assert len({*keys, *values}) == 8
        orders.add(tuple(first.index(pair) for pair in second))
    assert len(orders) > 5


def test_texts_have_values_of_the_kinds_that_are_asked_for(folder, corpus):
    config = config_of(folder, steps=100)
    mixed = config.override(["task.needle_values=number,uuid"])
    windows = NeedleWindows(mixed, corpus, BYTES)
    texts = [BYTES.decode(ids) for index in range(150, 200) for ids, _ in windows.texts(index)]
    kinds = [set(re.findall(r"special magic (\w+)s for", text)) for text in texts]
    assert {frozenset(each) for each in kinds} == {frozenset({"number"}), frozenset({"uuid"})}
    # Uuids are long, and leave as much room for other sentences.
    assert any("This is sentence" in text for text in texts if "magic uuids" in text and len(text) > 800)


def test_needles_that_do_not_fit_are_left_out_but_not_the_last():
    builder = NeedleBuilder(BYTES)
    ids, _ = builder.repeat(300, num_needles=50, random=np.random.default_rng(0))
    assert len(ids) <= 300
    assert len(re.findall(NEEDLE, BYTES.decode(ids))) == 4
    with pytest.raises(ValueError, match=r"length: expected at least 1\d\d tokens for a needle, found 100"):
        builder.repeat(100, num_needles=2, random=np.random.default_rng(0))


def test_more_needles_than_there_are_words_do_not_take_for_ever():
    ids, _ = NeedleBuilder(BYTES, value="word").repeat(
        10**5, num_needles=10**3, random=np.random.default_rng(0)
    )
    assert len(re.findall(NEEDLE, BYTES.decode(ids))) == 2 * 256


def test_texts_are_short_at_first_and_of_any_length_later(folder, corpus):
    windows = windows_of(folder, corpus, steps=100)
    early = [windows.texts(index) for index in range(2 * 60)]
    late = [windows.texts(index) for index in range(2 * 60, 2 * 100)]
    assert {len(texts) for texts in early} == {WINDOW // SHORTEST_NEEDLE_TEXT}
    assert {len(texts) for texts in late} == {1, 2, 3, 4}
    assert all(len(ids) < SHORTEST_NEEDLE_TEXT for texts in early for ids, _ in texts)
    for texts in late:
        assert sum(len(ids) + 1 for ids, _ in texts) <= WINDOW
    assert max(len(texts[0][0]) for texts in late) > 0.9 * WINDOW
    texts = [BYTES.decode(ids) for texts in [*early, *late] for ids, _ in texts]
    assert len(set(texts)) == len(texts)
    assert any("This is sentence" in text for text in texts)


def test_needles_are_bare_at_first_as_many_as_fit(folder, corpus):
    config = config_of(folder, steps=100).override(
        ["task.bare_needle_share=0.3", "task.needle_values=number,uuid"]
    )
    windows = NeedleWindows(config, corpus, BYTES)
    early = [windows.texts(index) for index in range(2 * 30)]
    assert {len(texts) for texts in map(windows.texts, range(2 * 30, 2 * 60))} == {4}
    kinds = set()
    for texts in early:
        sizes = [len(ids) + 1 for ids, _ in texts]
        assert WINDOW - 120 < sum(sizes) <= WINDOW
        for ids, is_answer in texts:
            first, again = BYTES.decode(ids).removeprefix(" ").split("\n")
            assert first == again
            assert BYTES.decode(ids[is_answer]) == again.split(":")[1].removesuffix(".")
            assert not is_answer[: len(first)].any()
            kinds.add(re.sub(r"[0-9a-f]", "x", first.split(": ")[1]))
    assert kinds == {"xxxxxxx.", "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx."}


def test_they_take_the_place_of_their_share_of_the_windows(folder, corpus):
    both = [windows_of(folder, corpus, share) for share in (0.3, 1.0)]
    shares = [np.mean([bool(windows.texts(index)) for index in range(200)]) for windows in both]
    assert 0.2 < shares[0] < 0.4
    assert shares[1] == 1
    config = config_of(folder, 0.5)
    windows = NeedleWindows(config, corpus, BYTES)
    mixed, plain = PackedTextDataset(config, corpus, windows), PackedTextDataset(config, corpus)
    kinds = set()
    for index in range(20):
        batch, texts = mixed.__getitems__([index]), windows.texts(index)
        kinds.add(bool(texts))
        if not texts:
            expected = plain.__getitems__([index])
            assert all(torch.equal(batch[name], expected[name]) for name in expected)
            continue
        rows = list(itertools.pairwise(batch["cu_seqlens"].tolist()))
        assert len(rows) == len(texts)
        for (start, stop), (ids, is_answer) in zip(rows, texts, strict=True):
            assert batch["input_ids"][0, start:stop].tolist() == [END, *ids.tolist()]
            predicted = [i if answers else IGNORE_INDEX for i, answers in zip(ids, is_answer, strict=True)]
            assert batch["shift_labels"][0, start:stop].tolist() == [*predicted, IGNORE_INDEX]
    assert kinds == {True, False}


def test_a_run_trains_on_them(folder, tmp_path, monkeypatch):
    seen = []
    texts = NeedleWindows.texts
    monkeypatch.setattr(NeedleWindows, "texts", lambda self, index: seen.append(index) or texts(self, index))
    loop.train(config_of(folder, steps=2), tmp_path / "run", reporter=quiet())
    assert seen[:4] == [0, 1, 2, 3]
    seen.clear()
    loop.train(config_of(folder, share=0.0, steps=2), tmp_path / "other", reporter=quiet())
    assert seen == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextTask(needle_share=1.5), r"needle_share: expected a share in \[0, 1\], found 1.5"),
        (
            lambda: TextTask(needle_values=("uuids",)),
            "needle_values: expected some of word, number, uuid, found",
        ),
        (
            lambda: TextTask(needle_share=1.0, bare_needle_share=-0.1),
            r"bare_needle_share: expected a share in \[0, 1\], found -0.1",
        ),
        (lambda: TextTask(bare_needle_share=0.5), "bare_needle_share: expected 0 without needles"),
        (lambda: TextTask(needle_share=0.5, carry_state=True), "needle_share: expected 0 with carry_state"),
        (
            lambda: tiny_config("x", task={"needle_share": 0.5}, lengths=(287,)),
            "train.lengths: expected lengths at which the task can be built, found 287: "
            "length: expected at least 288, found 287",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
