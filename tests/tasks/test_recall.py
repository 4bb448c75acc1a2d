"""The recall task: what an example holds, that it can be answered, and that it depends on its index alone."""

import itertools

import numpy as np
import pytest

from ovq_lab.tasks import IGNORE_INDEX, PositionalRecallTask, RecallTask, example_generator
from ovq_lab.tasks.recall import FILLER, SEPARATOR
from ovq_lab.train.recipes import get_recipe

TASK_FIELDS = [
    {},
    {"key_length": 2, "value_length": 3, "vocab_size": 40, "length": 101},
    {"key_length": 2, "vocab_size": 66, "pair_share": 0.25, "length": 200},
    {"num_pairs": 3, "vocab_size": 20, "query_share": 0.8, "length": 90},
    {"length": 5, "vocab_size": 4, "query_share": 0.9},
]


@pytest.mark.parametrize(("recipe", "share"), [("recall-ovq", 4 / 5), ("positional-ovq", 7 / 8)])
def test_most_questions_of_a_recipe_are_later_askings(recipe, share):
    batch = get_recipe(recipe).task.at_length(1024).build(0)
    first, later = (batch.slices[f"asking {name}"].sum() for name in ("first", "later"))
    assert later / (first + later) == pytest.approx(share, abs=0.01)


def read_pairs(task, tokens):
    """The pairs of one example, read as a model has to: fillers skipped, nothing known of places."""
    context = [token for token in tokens[: task.context_length] if token != FILLER]
    assert len(context) % task.pair_length == 0
    pairs = {}
    for start in range(0, len(context), task.pair_length):
        key = tuple(context[start : start + task.key_length])
        assert key not in pairs, "keys are distinct"
        pairs[key] = context[start + task.key_length : start + task.pair_length]
    return pairs


@pytest.mark.parametrize("fields", TASK_FIELDS)
def test_every_question_is_answered_by_the_context(fields):
    task = RecallTask(**fields)
    batch = task.build(3, indices=range(5), split="test")
    assert batch.inputs.shape == batch.labels.shape == (5, task.length)
    assert batch.inputs.dtype == batch.labels.dtype == np.int64
    for tokens, labels in zip(batch.inputs, batch.labels, strict=True):
        pairs = read_pairs(task, tokens)
        assert len(pairs) == task.num_stored
        assert tokens[task.context_length] == SEPARATOR
        asked_keys = []
        for start in range(task.context_length + 1, task.length, task.pair_length):
            key = tuple(tokens[start : start + task.key_length])
            asked_keys.append(key)
            value = slice(start + task.key_length, start + task.pair_length)
            assert list(labels[start : value.start]) == [IGNORE_INDEX] * task.key_length
            assert list(labels[value]) == list(tokens[value]) == pairs[key]
        assert len(asked_keys) == task.num_queries
        assert (labels[: task.context_length + 1] == IGNORE_INDEX).all()
        # No key is asked twice before all were asked once.
        first_round = asked_keys[: task.num_stored]
        assert len(set(first_round)) == len(first_round)


def test_keys_and_values_have_tokens_of_their_own():
    task = RecallTask(length=400, vocab_size=21, key_length=2)
    batch = task.build(0, indices=range(20))
    values = batch.labels[batch.labels != IGNORE_INDEX]
    assert set(values) == set(range(task.first_value_token, 21))
    keys = set(batch.inputs[batch.inputs < task.first_value_token]) - {FILLER, SEPARATOR}
    assert keys == set(range(2, task.first_value_token))


def test_train_and_test_streams_never_meet():
    drawn = {
        tuple(example_generator(seed, index, split=split).integers(2**62, size=2))
        for split, seed, index in itertools.product(("train", "test"), range(20), range(20))
    }
    assert len(drawn) == 2 * 20 * 20


def test_pairs_lie_anywhere_in_the_context():
    task = RecallTask(length=64, num_pairs=1, vocab_size=16)
    batch = task.build(0, indices=range(400))
    starts = (batch.inputs[:, : task.context_length] != FILLER).argmax(axis=1)
    assert set(starts) == set(range(task.context_length - 1))


@pytest.mark.parametrize(
    "task",
    [
        RecallTask(length=128, key_length=2, value_length=2, vocab_size=64, pair_share=0.5),
        PositionalRecallTask(length=128, key_length=2, vocab_size=256, pair_share=0.5),
    ],
    ids=lambda task: task.name,
)
def test_slices_tell_the_distance_to_the_pair(task):
    batch = task.build(0, indices=range(8))
    assert list(batch.slices) == list(task.build(1).slices)
    num_checked = 0
    for name, mask in batch.slices.items():
        if not name.startswith("distance"):
            continue
        low, high = map(int, name.removeprefix("distance ").split("-"))
        for row, position in np.argwhere(mask):
            offset = (position - task.context_length - 1) % task.query_length
            tokens, query = batch.inputs[row], position - offset
            key = tokens[query : query + 2]
            starts = [t for t in range(task.context_length) if (tokens[t : t + 2] == key).all()]
            # One pair with both tokens of the value, or a pair for each of the two values.
            start = starts[0] if isinstance(task, RecallTask) else starts[offset - 2]
            assert low <= query - start <= high
            num_checked += 1
    assert num_checked == 8 * task.num_queries * 2


def test_longer_examples_hold_more_unless_the_number_is_fixed():
    growing = RecallTask(length=256, key_length=2, pair_share=0.25)
    assert growing.at_length(4096).num_stored > 15 * growing.num_stored
    assert RecallTask(length=256, num_pairs=9).at_length(4096).num_stored == 9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 4}, r"length: expected at least 5 tokens .*, found 4"),
        ({"key_length": 0}, r"key_length: expected at least 1, found 0"),
        ({"value_length": -1}, r"value_length: expected at least 1, found -1"),
        ({"query_share": 1.0}, r"query_share: expected a number between 0 and 1, found 1.0"),
        ({"query_share": 0.0}, r"query_share: .*found 0.0"),
        ({"pair_share": 0.0}, r"pair_share: .*found 0.0"),
        ({"pair_share": 1.5}, r"pair_share: .*found 1.5"),
        ({"num_pairs": 0}, r"num_pairs: expected at least 1, found 0"),
        ({"num_pairs": 64}, r"num_pairs: expected at most 63, .*found 64"),
        (
            {"num_pairs": 4, "pair_share": 0.5},
            r"expected one of the two, found num_pairs 4 and pair_share 0.5",
        ),
        ({"vocab_size": 3}, r"vocab_size: expected at least 4, found 3"),
        ({"vocab_size": 20}, r"expected between 63 \(the keys of an example\) and .*, found 9\*\*1"),
        ({"key_length": 20, "num_pairs": 1}, r"expected between 1 .* and 2\*\*62 different keys, found"),
    ],
)
def test_bad_fields_are_refused_with_what_was_expected_and_found(fields, message):
    with pytest.raises(ValueError, match=message):
        RecallTask(**fields)


def test_bad_seeds_and_splits_are_refused():
    task = RecallTask()
    with pytest.raises(ValueError, match=r"split: expected one of train, test, found 'dev'"):
        task.build(0, split="dev")
    with pytest.raises(ValueError, match="found -1 and 0"):
        task.build(-1)
    with pytest.raises(ValueError, match="found 0 and -2"):
        task.build(0, indices=[-2])


@pytest.mark.parametrize("cls", [RecallTask, PositionalRecallTask])
def test_slices_tell_whether_the_answer_has_been_repeated(cls):
    task = cls(length=256, key_length=2, vocab_size=64, pair_share=0.25)
    batch = task.build(0, indices=range(4))
    assert batch.slices["asking later"].sum() > batch.slices["asking first"].sum() > 0
    for row, tokens in enumerate(batch.inputs):
        seen = set()
        for first in task.query_positions:
            key, answer = tuple(tokens[first : first + 2]), slice(first + 2, first + task.query_length)
            name = "asking later" if key in seen else "asking first"
            assert batch.slices[name][row, answer].all()
            seen.add(key)
