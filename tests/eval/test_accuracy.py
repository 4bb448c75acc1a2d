"""Evaluation: accuracy counted by hand, any batch size, and a dictionary that is put back."""

import numpy as np
import pytest
import torch
from tests.progress import Seen
from tests.tiny import tiny_model

from ovq.hf import OVQConfig
from ovq_lab.eval import accuracy
from ovq_lab.eval.accuracy import evaluate
from ovq_lab.eval.dictionaries import Dictionary, dictionaries_to_test, each_dictionary
from ovq_lab.eval.models import long_range_mixer
from ovq_lab.tasks import IGNORE_INDEX, RecallTask, RegressionTask

TASK = RecallTask(vocab_size=20, key_length=2, pair_share=0.5, query_share=0.6)


def build_model(*mixer_types):
    # Large weights, so that an untrained model has opinions.
    sizes = {"vocab_size": 20, "sliding_window": 4, "num_slots": 4, "chunk_size": 4, "initializer_range": 1.0}
    return tiny_model(mixer_types=list(mixer_types), **sizes)


def run(model, **arguments):
    return evaluate(model, TASK, reporter=Seen(), **arguments)


def test_accuracy_is_the_share_of_right_tokens_among_those_asked():
    model = build_model("sliding_attention", "ovq")
    [row] = run(model, lengths=[60], num_examples=40, seed=5)
    batch = TASK.at_length(60).build(5, indices=range(40), split="test")
    with torch.no_grad():
        predicted = model(torch.from_numpy(batch.inputs)).logits.argmax(-1).numpy()
    asked = batch.labels[:, 1:] != IGNORE_INDEX
    right = (predicted[:, :-1] == batch.labels[:, 1:]) & asked
    assert row.num_questions == asked.sum() == 40 * TASK.at_length(60).num_queries
    assert right.sum() > 0
    assert row.accuracy == right.sum() / asked.sum()
    # In the order of the task, without those that nothing falls into.
    assert list(row.slices) == [name for name, mask in batch.slices.items() if mask.any()]
    for name, mask in batch.slices.items():
        if not mask.any():
            continue
        assert row.slices[name] == right[mask[:, 1:]].mean()
    assert (row.mixer, row.num_slots, row.length) == ("ovq", 4, 60)
    assert row.state_bytes == model.state_bytes(60)


def test_a_model_that_knows_the_answers_scores_one(monkeypatch):
    monkeypatch.setattr(accuracy, "answers_of", lambda _, batch: batch.labels[batch.labels != IGNORE_INDEX])
    [row] = run(build_model("ovq"), lengths=[60], num_examples=3)
    assert row.accuracy == 1.0
    assert set(row.slices.values()) == {1.0}


def test_errors_are_averaged_in_all_and_by_slice_for_tasks_that_have_them():
    task = RegressionTask(vocab_size=20, max_slope=1, max_offset=1, max_x=1)
    model = build_model("ovq")
    [row] = evaluate(model, task, lengths=[60], num_examples=9, reporter=Seen())
    batch = task.at_length(60).build(0, indices=range(9), split="test")
    with torch.no_grad():
        predicted = model(torch.from_numpy(batch.inputs)).logits.argmax(-1).numpy()[:, :-1]
    labels = batch.labels[:, 1:]
    errors = np.where(predicted >= task.first_y_token, abs(predicted - labels), 2 * task.max_y + 1)
    asked = labels != IGNORE_INDEX
    assert row.mean_error == pytest.approx(errors[asked].mean())
    assert list(row.slice_errors) == list(row.slices)
    for name, error in row.slice_errors.items():
        assert error == pytest.approx(errors[batch.slices[name][:, 1:]].mean())
    [recall] = run(model, lengths=[60], num_examples=1)
    assert (recall.mean_error, recall.slice_errors) == (None, {})


def test_the_size_of_micro_batches_does_not_show(monkeypatch):
    model = build_model("sliding_attention", "ovq")
    whole = run(model, lengths=[40, 60], num_examples=7)
    monkeypatch.setattr(accuracy, "TOKENS_PER_BATCH", 100)
    assert run(model, lengths=[40, 60], num_examples=7) == whole


def test_each_length_may_have_a_number_of_examples_of_its_own():
    model = build_model("sliding_attention", "ovq")
    seen = Seen()
    options = {"lengths": [40, 60], "num_examples": [5, 2], "num_slots": [4, 8]}
    together = evaluate(model, TASK, **options, reporter=seen)
    assert (seen.total, seen.done) == (14, [5, 7, 12, 14])
    assert together[:2] == [
        *run(model, lengths=[40], num_examples=5),
        *run(model, lengths=[60], num_examples=2),
    ]


def test_the_dictionary_is_varied_on_the_same_weights_and_put_back():
    model = build_model("sliding_attention", "ovq")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    rows = run(model, lengths=[40, 200], num_slots=[2, 64], num_examples=20)
    assert [(row.num_slots, row.length) for row in rows] == [(2, 40), (2, 200), (64, 40), (64, 200)]
    assert rows[1].state_bytes < rows[3].state_bytes
    assert rows[1].accuracy != rows[3].accuracy
    assert model.config.num_slots == 4
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name])
    # An error in the middle leaves the model as it was, too.
    with pytest.raises(ValueError, match=r"at least 1, found 0|at least 1.*0"):
        run(model, lengths=[40], num_slots=[2, 0])
    assert model.config.num_slots == 4


def test_rules_are_varied_on_the_same_weights_and_put_back():
    model = build_model("sliding_attention", "ovq")
    model.set_merge("existing", growth="linear")
    arguments = {"lengths": [40, 200], "num_examples": 20}
    rows = run(model, num_slots=[2, 8], merges=["nearest", "existing"], **arguments)
    assert [(row.num_slots, row.merge, row.length) for row in rows] == [
        (slots, merge, length)
        for slots in (2, 8)
        for merge in ("nearest", "existing")
        for length in (40, 200)
    ]
    assert (model.config.num_slots, model.config.merge, model.config.growth) == (4, "existing", "linear")
    # The model's own rule keeps its growth, another has the growth that it is meant for.
    assert run(model, num_slots=[8], **arguments) == rows[6:]
    model.set_merge("nearest", growth="immediate")
    assert run(model, num_slots=[8], **arguments) == rows[4:6] != rows[6:]
    assert run(model, num_slots=[8], merges=["nearest"], **arguments) == rows[4:6]
    # An error in the middle leaves the model as it was, too.
    with pytest.raises(ValueError, match="merge: expected one of"):
        run(model, merges=["existing", "neither"], **arguments)
    assert (model.config.merge, model.config.growth) == ("nearest", "immediate")


def test_a_rule_that_is_named_twice_is_tested_once():
    found = dictionaries_to_test(OVQConfig(), merges=["nearest", "existing", "nearest"])
    assert [dictionary.merge for dictionary in found] == ["nearest", "existing"]


def test_the_modes_of_the_model_are_put_back():
    model = build_model("full_attention").train()
    model.lm_head.eval()
    assert [model.training for _ in each_dictionary(model, [Dictionary()])] == [False]
    [row] = run(model, lengths=[40], num_examples=1)
    assert [module for module in model.modules() if not module.training] == [model.lm_head]
    assert (row.mixer, row.num_slots, row.merge) == ("full_attention", None, None)


def test_test_questions_are_not_those_of_training():
    train = TASK.build(0, indices=range(50), split="train").inputs
    test = TASK.build(0, indices=range(50), split="test").inputs
    assert not (train[:, None] == test[None]).all(-1).any()
    assert np.unique(test, axis=0).shape[0] == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": []}, r"expected lengths and at least one example for each, found \[\] and 64"),
        ({"lengths": [40], "num_examples": 0}, r"found \[40\] and 0"),
        ({"lengths": [40, 60], "num_examples": [3]}, r"found \[40, 60\] and \[3\]"),
        ({"lengths": [3]}, "length: expected at least"),
        ({"lengths": [40], "num_slots": [8]}, "expected a model with 'ovq' layers"),
        ({"lengths": [40], "merges": ["nearest"]}, "expected a model with 'ovq' layers"),
    ],
)
def test_what_cannot_be_tested_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(build_model("full_attention"), **arguments)


def test_a_task_with_unknown_tokens_is_refused():
    task = RecallTask(vocab_size=40, num_pairs=2)
    with pytest.raises(ValueError, match=r"at most 20 token ids.*found 40"):
        evaluate(build_model("ovq"), task, lengths=[16], reporter=Seen())


@pytest.mark.parametrize(
    ("mixer_types", "name"),
    [
        (["sliding_attention", "ovq"], "ovq"),
        (["full_attention", "sliding_attention"], "full_attention"),
        (["full_attention", "ovq"], "ovq"),
        (["sliding_attention", "sliding_attention"], "sliding_attention"),
    ],
)
def test_a_model_is_named_after_its_long_range_mixer(mixer_types, name):
    assert long_range_mixer(OVQConfig(num_hidden_layers=2, mixer_types=mixer_types)) == name
