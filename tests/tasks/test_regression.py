"""Regression: every y lies on its function's line, and nothing asked could have been looked up."""

import numpy as np
import pytest

from ovq_lab.tasks import IGNORE_INDEX, RegressionTask

TASK_FIELDS = [
    {"vocab_size": 100, "length": 301},
    {"vocab_size": 200, "length": 900, "max_functions": 4},
    {"vocab_size": 60, "length": 100, "max_slope": 0, "max_x": 1, "min_seen": 0, "points_per_function": 3},
    {"vocab_size": 20, "length": 9, "max_slope": 1, "max_offset": 0},
]


def read_points(task, tokens):
    """`(position of y, name, x, y)` of every point, as numbers."""
    for position in range(task.length % 3 + 2, task.length, 3):
        name, x, y = tokens[position - 2 : position + 1]
        yield position, name, x - task.first_x_token - task.max_x, y - task.first_y_token - task.max_y


@pytest.mark.parametrize("fields", TASK_FIELDS)
def test_points_lie_on_lines_and_are_asked_once_enough_were_seen(fields):
    task = RegressionTask(**fields)
    batch = task.build(1, indices=range(6), split="test")
    for row, (tokens, labels) in enumerate(zip(batch.inputs, batch.labels, strict=True)):
        lines = {}
        for position, name, x, y in read_points(task, tokens):
            assert 1 <= name < task.first_x_token
            assert abs(x) <= task.max_x
            points = lines.setdefault(name, [])
            # Not until all others were asked does an argument come again.
            assert x not in [
                earlier for earlier, _ in points[len(points) - len(points) % (2 * task.max_x + 1) :]
            ]
            is_asked = len(points) >= task.min_seen
            assert labels[position] == (tokens[position] if is_asked else IGNORE_INDEX)
            if is_asked:
                [name_of_slice] = [name for name, mask in batch.slices.items() if mask[row, position]]
                bounds = [int(bound) for bound in name_of_slice.removeprefix("seen ").split("-")]
                assert bounds[0] <= len(points) <= bounds[-1]
            points.append((x, y))
        assert len(lines) == task.num_functions
        lengths = [len(points) for points in lines.values()]
        assert max(lengths) - min(lengths) <= 1
        for points in lines.values():
            fits = [
                (a, b)
                for a in range(-task.max_slope, task.max_slope + 1)
                for b in range(-task.max_offset, task.max_offset + 1)
                if all(y == a * x + b for x, y in points)
            ]
            assert len(fits) == 1 or len({x for x, _ in points}) == 1


def test_arguments_come_in_an_order_of_their_own_for_each_function_and_example():
    task = RegressionTask(length=168, vocab_size=100, points_per_function=7)
    orders = set()
    batch = task.build(0, indices=range(4))
    for tokens in batch.inputs:
        arguments = {}
        for _, name, x, _ in read_points(task, tokens):
            arguments.setdefault(name, []).append(int(x))
        orders |= {tuple(order) for order in arguments.values()}
    assert len(orders) > 30


def test_functions_of_an_example_are_interleaved():
    task = RegressionTask(length=384, vocab_size=100)
    names = task.build(0).inputs[0, 0::3]
    assert task.num_functions == 16
    assert (names[1:] == names[:-1]).mean() < 0.2


def test_longer_examples_have_more_functions_up_to_a_bound():
    task = RegressionTask(length=384, points_per_function=8)
    assert [task.at_length(length).num_functions for length in (384, 1536, 3072, 65536)] == [16, 64, 128, 128]


def test_errors_are_distances_and_an_answer_that_is_no_value_is_as_wrong_as_can_be():
    task = RegressionTask(vocab_size=100)
    label = task.first_y_token + task.max_y
    answers = np.array([label, label + 3, label - 2, task.first_x_token, 0])
    errors = task.errors(answers, np.full(5, label))
    assert errors.tolist() == [0, 3, 2, 2 * task.max_y + 1, 2 * task.max_y + 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 8}, r"length: expected at least 9 tokens .*, found 8"),
        ({"max_x": -1}, r"max_x: expected at least 0, found -1"),
        ({"points_per_function": 0}, r"points_per_function: expected at least 1, found 0"),
        ({"points_per_function": 2}, r"points_per_function: expected more than min_seen \(2\), found 2"),
        ({"length": 3072, "vocab_size": 156}, r"vocab_size: expected at least 157 \(a name for each of 128"),
    ],
)
def test_bad_fields_are_refused_with_what_was_expected_and_found(fields, message):
    with pytest.raises(ValueError, match=message):
        RegressionTask(**fields)
