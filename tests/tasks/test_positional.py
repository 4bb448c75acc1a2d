"""Positional recall: values are asked for in the order in which the context holds them."""

import numpy as np
import pytest

from ovq_lab.tasks import IGNORE_INDEX, PositionalRecallTask
from ovq_lab.tasks.recall import FILLER, SEPARATOR

TASK_FIELDS = [
    {},
    {"key_length": 2, "num_occurrences": 3, "vocab_size": 40, "length": 101},
    {"key_length": 2, "vocab_size": 66, "pair_share": 0.25, "length": 200},
    {"length": 8, "vocab_size": 6, "query_share": 0.9},
    {"num_occurrences": 1, "length": 40},
]


def read_values(task, tokens):
    """The values of each key in order of appearance, read as a model has to: nothing known of places."""
    context = [token for token in tokens[: task.context_length] if token != FILLER]
    assert len(context) % task.pair_length == 0
    values = {}
    for start in range(0, len(context), task.pair_length):
        key = tuple(context[start : start + task.key_length])
        values.setdefault(key, []).append(context[start + task.key_length])
    return values


@pytest.mark.parametrize("fields", TASK_FIELDS)
def test_values_are_asked_for_in_order_of_appearance(fields):
    task = PositionalRecallTask(**fields)
    batch = task.build(3, indices=range(5), split="test")
    for row, (tokens, labels) in enumerate(zip(batch.inputs, batch.labels, strict=True)):
        values = read_values(task, tokens)
        assert len(values) == task.num_keys
        for stored in values.values():
            assert len(set(stored)) == len(stored) == task.num_occurrences
        assert tokens[task.context_length] == SEPARATOR
        asked_keys = []
        for start in range(task.context_length + 1, task.length, task.query_length):
            first = start + task.key_length
            key = tuple(tokens[start:first])
            asked_keys.append(key)
            answer = slice(first, start + task.query_length)
            assert list(labels[start:first]) == [IGNORE_INDEX] * task.key_length
            assert list(labels[answer]) == list(tokens[answer]) == values[key]
            for occurrence in range(task.num_occurrences):
                mask = batch.slices[f"occurrence {occurrence + 1}"][row]
                assert mask[first + occurrence]
                assert mask[answer].sum() == 1
        assert len(asked_keys) == task.num_queries
        assert (labels[: task.context_length + 1] == IGNORE_INDEX).all()
        first_round = asked_keys[: task.num_keys]
        assert len(set(first_round)) == len(first_round)


def test_all_pairs_of_values_are_equally_likely():
    # Three value tokens, so six ordered pairs.
    task = PositionalRecallTask(length=24, vocab_size=8)
    batch = task.build(0, indices=range(600))
    assert task.vocab_size - task.first_value_token == 3
    asked = batch.labels[batch.labels != IGNORE_INDEX].reshape(-1, 2)
    _, counts = np.unique(asked, axis=0, return_counts=True)
    assert len(counts) == 6
    assert abs(counts / counts.sum() - 1 / 6).max() < 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 7}, r"length: expected at least 8 tokens .*, found 7"),
        ({"key_length": 0}, r"key_length: expected at least 1, found 0"),
        ({"num_occurrences": 0}, r"num_occurrences: expected at least 1, found 0"),
        ({"query_share": 1.0}, r"query_share: expected a number between 0 and 1, found 1.0"),
        ({"pair_share": 1.5}, r"pair_share: expected a number above 0 and at most 1, found 1.5"),
        ({"vocab_size": 4}, r"vocab_size: expected at least 6 \(2 different values a key\), found 4"),
        ({"vocab_size": 20}, r"expected between \d+ \(the keys of an example\) and .*, found 9\*\*1"),
    ],
)
def test_bad_fields_are_refused_with_what_was_expected_and_found(fields, message):
    with pytest.raises(ValueError, match=message):
        PositionalRecallTask(**fields)
