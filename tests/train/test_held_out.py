"""The loss on held-out text during a run: what it is measured on, and that it changes nothing."""

import json

import numpy as np
import pytest
import torch
from tests.tiny import losses
from tests.train.text_common import quiet, stopped_at, tiny_config, write_texts

from ovq_lab.figures.plan import run_name
from ovq_lab.text import load_corpus
from ovq_lab.train.config import RunConfig
from ovq_lab.train.history import History
from ovq_lab.train.loop import resume, train
from ovq_lab.train.recipes import get_recipe
from ovq_lab.train.text import HeldOutWindows, read_positions


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return write_texts(tmp_path, monkeypatch)


def config_of(folder, *changes, mixer="ovq", **train):
    return tiny_config(folder, mixer, **train).override(["task.held_out=0.7", *changes])


def test_windows_are_spread_over_the_documents(folder):
    corpus = load_corpus(config_of(folder).task, "validation")
    assert len(corpus) > 1
    whole = [
        np.concatenate(part)
        for part in zip(
            *(read_positions(corpus, i, 0, n + 1) for i, n in enumerate(corpus.num_tokens)), strict=True
        )
    ]
    available = len(whole[0]) // 8
    for number in (1, 3, available, available + 5):
        data = HeldOutWindows(corpus, length=8, num_windows=number)
        assert len(data) == min(number, available)
        starts = []
        for i in range(len(data)):
            window = data.__getitems__([i])
            [start] = [
                start
                for start in range(0, len(whole[0]) - 7, 8)
                if np.array_equal(whole[0][start : start + 8], window["input_ids"][0])
                and np.array_equal(whole[1][start : start + 8], window["labels"][0])
                and start not in starts
            ][:1]
            starts.append(start)
            # Each document is a row of its own, which begins after the token that ends a text.
            rows = window["cu_seqlens"].tolist()
            assert (rows[0], rows[-1]) == (0, 8)
            inner = [p for p in range(1, 8) if window["input_ids"][0, p] == corpus.end_of_text]
            assert rows[1:-1] == inner
    short = HeldOutWindows(corpus, length=10**6, num_windows=4)
    assert len(short) == 1
    assert np.array_equal(short.__getitems__([0])["input_ids"][0], whole[0])


@pytest.mark.parametrize("mixer", ["ovq", "vq"])
@pytest.mark.parametrize("is_carrying", [False, True])
def test_measuring_changes_nothing_and_is_right(folder, tmp_path, mixer, is_carrying):
    changes = [f"task.carry_state={str(is_carrying).lower()}"]
    plain = config_of(folder, *changes, mixer=mixer)
    train(plain, tmp_path / "plain", reporter=quiet())
    config = plain.override(["train.eval_every=4"])
    model = train(config, tmp_path / "measured", reporter=quiet())
    assert losses(tmp_path / "measured") == losses(tmp_path / "plain")
    history = History.load(tmp_path / "measured")
    assert list(history.training) == [1, 2, 3, 4, 5, 6]
    assert list(history.training.values()) == losses(tmp_path / "plain")
    # Every fourth step, and the last, once each.
    assert list(history.held_out) == [4, 6]
    assert (tmp_path / "measured" / "trainer_state.json").read_text().count('"eval_loss"') == 2
    data = HeldOutWindows(load_corpus(config.task, "validation"), length=16, num_windows=32)
    with torch.no_grad():
        by_hand = [float(model(**data.__getitems__([i])).loss) for i in range(len(data))]
    assert history.held_out[6] == pytest.approx(np.mean(by_hand), rel=1e-5)
    assert History.load(tmp_path / "plain").held_out == {}


def test_a_resumed_run_measures_the_same(folder, tmp_path):
    config = config_of(folder, "train.eval_every=2", "train.save_every=3")
    train(config, tmp_path / "whole", reporter=quiet())
    stopped_at(config, 3, tmp_path / "whole", tmp_path / "part")
    resume(tmp_path / "part", reporter=quiet())
    assert History.load(tmp_path / "part") == History.load(tmp_path / "whole")
    assert list(History.load(tmp_path / "part").held_out) == [2, 4, 6]


def test_the_name_of_a_run_does_not_depend_on_what_is_measured():
    config = get_recipe("lm-ovq")
    assert run_name(config.override(["train.eval_every=50"])) == run_name(config)


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        ("recall-ovq", [], "expected 0 with the task recall, whose examples never repeat"),
        ("lm-ovq", ["task.held_out=0"], "expected task.held_out above 0, found 0"),
        ("lm-ovq", ["train.eval_every=-1"], "train.eval_every: expected at least 0, found -1"),
    ],
)
def test_what_cannot_be_measured_is_refused(recipe, changes, said):
    with pytest.raises(ValueError, match=said):
        get_recipe(recipe).override(["train.eval_every=5", *changes])


def test_a_corpus_without_held_out_documents_is_refused(folder, tmp_path):
    for path in list(folder.iterdir())[1:]:
        path.unlink()
    config = config_of(folder, "train.eval_every=2", "task.held_out=0.0001", "train.lengths=4")
    # A folder that was there stays.
    (tmp_path / "empty").mkdir()
    for name in ("run", "empty"):
        with pytest.raises(ValueError, match="expected documents for validation"):
            train(config, tmp_path / name, reporter=quiet())
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "empty").iterdir()) == []


def test_earlier_configurations_have_no_such_field(folder):
    saved = json.loads(config_of(folder).to_json())
    del saved["train"]["eval_every"], saved["train"]["init_from"]
    assert RunConfig.from_json(json.dumps(saved)) == config_of(folder)
