"""MQAR: the layout of Zoology's generator, and its distribution of gaps."""

import numpy as np
import pytest

from ovq_lab.tasks import IGNORE_INDEX, MQARTask


@pytest.mark.parametrize("use_random_fillers", [True, False])
def test_every_key_comes_again_once_and_its_value_is_asked_behind_it(use_random_fillers):
    task = MQARTask(length=128, num_pairs=20, use_random_fillers=use_random_fillers)
    batch = task.build(0, indices=range(10), split="test")
    for row, (tokens, labels) in enumerate(zip(batch.inputs, batch.labels, strict=True)):
        keys, values = tokens[0:40:2], tokens[1:40:2]
        assert len(set(keys)) == len(set(values)) == 20
        assert 1 <= keys.min() <= keys.max() < 4096 <= values.min()
        [asked] = np.nonzero(labels != IGNORE_INDEX)
        assert len(asked) == 20
        # Keys stand at even places, and their answers behind them, where they are not shown.
        assert (asked % 2 == 1).all()
        assert asked.min() > 40
        pairs = dict(zip(keys, values, strict=True))
        for position in asked:
            key = tokens[position - 1]
            assert labels[position] == pairs.pop(key)
            distance = position - 1 - 2 * list(keys).index(key)
            [name] = [name for name, mask in batch.slices.items() if mask[row, position]]
            low, high = map(int, name.removeprefix("distance ").split("-"))
            assert low <= distance <= high
        assert not pairs
        fillers = np.delete(tokens[40:], asked - 41)
        assert (fillers.max() > 0) == use_random_fillers


def test_gaps_follow_the_power_law():
    # One pair an example, so that the places are independent draws.
    for power in (0.01, 1.0):
        task = MQARTask(length=34, num_pairs=1, power=power)
        labels = task.build(0, indices=range(4000)).labels
        places = (labels != IGNORE_INDEX).argmax(axis=1) // 2 - 1
        expected = np.arange(1, 17) ** (power - 1)
        expected /= expected.sum()
        frequencies = np.bincount(places, minlength=16) / 4000
        # 4 standard deviations of the most likely place.
        assert abs(frequencies - expected).max() < 4 * np.sqrt(0.25 / 4000)


def test_sizes_are_those_zoology_tests():
    sizes = [(64, 16), (128, 32), (256, 64), (512, 128), (1024, 256), (65536, 256)]
    assert [(length, MQARTask(length=length).num_stored) for length, _ in sizes] == sizes
    assert MQARTask(num_pairs=4).at_length(1024).num_stored == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 63}, r"length: expected an even number of at least 4 tokens, found 63"),
        ({"num_pairs": 17}, r"num_pairs: expected between 1 and 16 .*, found 17"),
        ({"power": 0.0}, r"power: expected a number above 0 and at most 1, found 0.0"),
        ({"vocab_size": 33}, r"vocab_size: expected at least 34 .*, found 33"),
    ],
)
def test_bad_fields_are_refused_with_what_was_expected_and_found(fields, message):
    with pytest.raises(ValueError, match=message):
        MQARTask(**fields)
