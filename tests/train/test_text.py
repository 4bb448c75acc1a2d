"""Windows of text: what is in them, who reads them, and that no document sees another."""

import itertools

import numpy as np
import pytest
import torch
from tests.train.text_common import END, TEXTS, quiet, tiny_config, write_texts
from torch.utils.data import DataLoader

from ovq_lab.text import TextSource, load_corpus
from ovq_lab.train import loop
from ovq_lab.train.config import RunConfig
from ovq_lab.train.data import CORPUS_FILE, training_data
from ovq_lab.train.text import CarriedTextDataset, PackedTextDataset, read_positions


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return write_texts(tmp_path, monkeypatch)


@pytest.fixture
def corpus(folder):
    return load_corpus(TextSource(dataset=str(folder), held_out=0), "train")


def rows_of(batch):
    """The rows of a packed batch, inputs and targets."""
    ends = batch["cu_seqlens"].tolist()
    for start, stop in itertools.pairwise(ends):
        yield [batch[name][0, start:stop].tolist() for name in ("input_ids", "shift_labels")]


def whole(text):
    return [END, *text.encode(), END]


def test_a_position_predicts_the_next_token_from_the_end_mark_to_the_end_mark(corpus):
    for document, text in enumerate(TEXTS.values()):
        expected = whole(text)
        for start in (0, 1, 5, len(text)):
            for stop in (start + 1, start + 4, len(text) + 1):
                if start < stop <= len(text) + 1:
                    inputs, targets = read_positions(corpus, document, start, stop)
                    assert inputs.tolist() == expected[start:stop]
                    assert targets.tolist() == expected[start + 1 : stop + 1]


def test_every_row_is_of_one_document(folder, corpus):
    config = tiny_config(folder, lengths=(16, 24), length_shares=(0.5, 0.5))
    data = PackedTextDataset(config, corpus)
    documents = [whole(text) for text in TEXTS.values()]
    sizes = set()
    for step in range(config.train.steps):
        batch = data.__getitems__(range(4 * step, 4 * step + 4))
        assert batch["input_ids"].shape == (1, 4 * config.train.length_at(step))
        assert torch.equal(batch["labels"], batch["shift_labels"])
        for inputs, targets in rows_of(batch):
            sizes.add(len(inputs))
            assert inputs[1:] == targets[:-1]
            text = [*inputs, targets[-1]]
            assert any(
                text == document[i : i + len(text)] for document in documents for i in range(len(document))
            )
    assert len(sizes) > 4


def test_an_epoch_shows_every_position_once_and_the_next_one_in_another_order(folder, corpus):
    # One window has two tokens more than a number of windows has: what is left over is that short.
    total = sum(len(text) + 1 for text in TEXTS.values())
    config = tiny_config(folder, lengths=(8,), length_shares=(1.0,), steps=total)
    data = PackedTextDataset(config, corpus)
    num_windows = total // 8

    def shown(first):
        pieces = [piece for i in range(num_windows) for piece in data._window(first + i)]
        positions = [(d, p) for d, start, stop in pieces for p in range(start, stop)]
        assert len(set(positions)) == len(positions) == num_windows * 8
        return positions

    first, second = shown(0), shown(num_windows)
    assert first != second
    assert len(set(first) & set(second)) >= total - 16


def test_the_index_and_the_seed_alone_say_what_a_window_is(folder, corpus):
    config = tiny_config(folder)
    one, other = PackedTextDataset(config, corpus), PackedTextDataset(config, corpus)
    late = other.__getitems__([20, 21])
    for name, tensor in one.__getitems__([3]).items():
        assert torch.equal(tensor, other.__getitems__([3])[name])
    assert torch.equal(late["input_ids"], one.__getitems__([20, 21])["input_ids"])
    seeded = PackedTextDataset(tiny_config(folder, seed=1), corpus)
    assert not torch.equal(seeded.__getitems__([3])["input_ids"], one.__getitems__([3])["input_ids"])


@pytest.mark.parametrize("kind", [PackedTextDataset, CarriedTextDataset])
def test_processes_share_what_one_would_read(folder, corpus, kind):
    config = tiny_config(folder)
    data = kind(config, corpus)
    batches = list(DataLoader(data, batch_size=1, collate_fn=lambda batch: batch))
    assert len(data) == len(batches) == config.train.steps * config.train.batch_size
    for i in (0, 5, 11):
        assert torch.equal(batches[i]["input_ids"], data.__getitems__([i])["input_ids"])


def test_lanes_read_whole_documents_in_order(folder, corpus):
    config = tiny_config(folder, steps=60, lengths=(16,), length_shares=(1.0,))
    data = CarriedTextDataset(config, corpus)
    read, finished = {}, []
    for index in range(len(data)):
        batch = data.__getitems__([index])
        lane = batch["lane"]
        assert lane == index % 4
        assert batch["num_read"] == (len(read[lane]) if batch["num_read"] else 0)
        inputs = batch["input_ids"][0].tolist()
        read[lane] = (read.get(lane, []) if batch["num_read"] else []) + inputs
        assert len(inputs) == 16 or batch["is_last"]
        if batch["is_last"]:
            assert batch["shift_labels"][0, -1] == END
            finished.append(bytes(read[lane][1:]).decode())
    # More than one epoch, in each of which every document is read once.
    assert set(finished) == set(TEXTS.values())
    assert len(finished) > len(TEXTS)
    assert all(finished[: len(TEXTS) // 2].count(text) <= 1 for text in TEXTS.values())


def test_no_document_sees_another(folder, corpus):
    config = tiny_config(folder)
    data = PackedTextDataset(config, corpus)
    model = loop.build_model(config).eval()
    batch = data.__getitems__(range(4))
    assert len(batch["cu_seqlens"]) > 5
    with torch.no_grad():
        packed = model(**batch).loss
        alone = [
            model(torch.tensor([inputs]), shift_labels=torch.tensor([targets])).loss * len(inputs)
            for inputs, targets in rows_of(batch)
        ]
        leaking = model(batch["input_ids"], shift_labels=batch["shift_labels"]).loss
    mean = sum(alone) / batch["input_ids"].numel()
    torch.testing.assert_close(packed, mean)
    assert (leaking - mean).abs() > 1e-4


def test_a_corpus_shorter_than_a_window_is_refused(folder, corpus):
    total = sum(len(text) + 1 for text in TEXTS.values())
    with pytest.raises(ValueError, match=rf"train.lengths: expected at most {total}, .*found {total + 1}"):
        PackedTextDataset(tiny_config(folder, lengths=(total + 1,), length_shares=(1.0,)), corpus)


def test_a_run_trains_on_the_training_documents_alone(folder):
    config = tiny_config(folder).override(["task.held_out=0.5"])
    with quiet() as reporter:
        data = training_data(config, folder, None, reporter)
    kept = load_corpus(TextSource(dataset=str(folder), held_out=0.5), "train")
    held_out = load_corpus(TextSource(dataset=str(folder), held_out=0.5), "test")
    shown = np.concatenate([data.examples.__getitems__([i])["input_ids"][0] for i in range(24)])
    # Each text has a letter of its own.
    letters = [{int(tokens[0]) for tokens in corpus} for corpus in (kept, held_out)]
    assert not letters[0] & letters[1]
    assert set(shown.tolist()) & letters[0]
    assert not set(shown.tolist()) & letters[1]


def test_processes_but_the_first_do_not_wait_for_the_folder_of_a_run(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    out = tmp_path / "not there yet"
    with quiet() as reporter:
        training_data(tiny_config(folder), out, None, reporter)
        monkeypatch.setenv("RANK", "0")
        out.mkdir()
        training_data(tiny_config(folder), out, None, reporter)
    assert [path.name for path in out.iterdir()] == [CORPUS_FILE]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["task.carry_state=true"],
            r"task.carry_state: expected a single length in train.lengths, .*found \(16, 24\)",
        ),
        (
            [
                *("task.carry_state=true", "train.lengths=16", "train.length_shares=1"),
                "train.use_gradient_checkpointing=true",
            ],
            r"task.carry_state: expected train.use_gradient_checkpointing=false, .*found true",
        ),
        (
            ["task.carry_state=true", "train.lengths=16", "train.length_shares=1", "train.micro_batches=2"],
            r"task.carry_state: expected train.micro_batches=1, .*found 2",
        ),
        (["task.held_out=2"], r"held_out: expected a share in \[0, 1\), found 2.0"),
        (
            ["train.lengths=0,2"],
            r"train.lengths: expected lengths at which the task can be built, found 0: length: expected",
        ),
        (["task.length=7"], r"--set task.length: expected one of the fields .*carry_state"),
    ],
)
def test_sections_that_do_not_fit_are_refused(tmp_path, assignments, message):
    config = tiny_config(tmp_path, lengths=(16, 24), length_shares=(0.5, 0.5))
    with pytest.raises(ValueError, match=message):
        config.override(assignments)


def test_the_configuration_survives_its_file(tmp_path):
    config = tiny_config(tmp_path).override(["task.join_to=100", "task.max_documents=7"])
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config
    assert config.to_json().count('"name": "lm"') == 1


def test_a_vocabulary_is_known_before_its_tokenizer(tmp_path):
    config = tiny_config(tmp_path)
    assert loop.model_config(config).vocab_size == 257
    assert loop.model_config(config.override(["task.tokenizer=bpe:300"])).vocab_size == 300


def test_a_run_that_was_refused_can_be_tried_again(folder, tmp_path):
    out = tmp_path / "run"
    missing = tiny_config(tmp_path / "books", steps=1)
    with quiet() as reporter:
        with pytest.raises(ValueError, match="expected a file or folder, found nothing"):
            loop.train(missing, out, reporter=reporter)
        loop.train(tiny_config(folder, steps=1), out, reporter=reporter)
    assert RunConfig.load(out).task.dataset == str(folder)
