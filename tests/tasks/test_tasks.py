"""What holds for every task: examples of their own streams, slices of asked tokens, any length."""

import numpy as np
import pytest

from ovq_lab.tasks import IGNORE_INDEX, TASKS, MQARTask, PositionalRecallTask, RecallTask, RegressionTask

SMALL = {
    "recall": RecallTask(length=64, pair_share=0.5),
    "positional": PositionalRecallTask(length=64, pair_share=0.6),
    "regression": RegressionTask(length=64, vocab_size=100),
    "mqar": MQARTask(length=64),
}
LONG = {
    "recall": RecallTask(vocab_size=1024, key_length=2),
    "positional": PositionalRecallTask(vocab_size=1024, key_length=2, num_occurrences=3),
    "regression": RegressionTask(),
    "mqar": MQARTask(),
}


def test_tasks_are_found_by_name():
    assert {name: type(task) for name, task in SMALL.items()} == TASKS


@pytest.mark.parametrize("name", TASKS)
def test_an_example_depends_on_its_seed_and_index_alone(name):
    task = SMALL[name]
    together = task.build(7, indices=[4, 0, 9])
    assert together.inputs.shape == together.labels.shape == (3, 64)
    assert together.inputs.dtype == together.labels.dtype == np.int64
    assert 0 <= together.inputs.min() <= together.inputs.max() < task.vocab_size
    for row, index in enumerate([4, 0, 9]):
        alone = task.build(7, indices=[index])
        np.testing.assert_array_equal(alone.inputs[0], together.inputs[row])
        np.testing.assert_array_equal(alone.labels[0], together.labels[row])
        assert list(alone.slices) == list(together.slices)
        for slice_name, mask in alone.slices.items():
            np.testing.assert_array_equal(mask[0], together.slices[slice_name][row])
    assert (task.build(8, indices=[4]).inputs != together.inputs[0]).any()
    assert (task.build(7, indices=[4], split="test").inputs != together.inputs[0]).any()


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_may_be_empty(name):
    batch = SMALL[name].build(0, indices=[])
    assert batch.inputs.shape == batch.labels.shape == (0, 64)
    assert {mask.shape for mask in batch.slices.values()} == {(0, 64)}


@pytest.mark.parametrize("name", TASKS)
def test_slices_of_one_kind_cover_each_asked_token_once(name):
    batch = SMALL[name].build(0, indices=range(20))
    for kind in {slice_name.split()[0] for slice_name in batch.slices}:
        masks = [mask for slice_name, mask in batch.slices.items() if slice_name.startswith(kind)]
        np.testing.assert_array_equal(np.sum(masks, axis=0), batch.labels != IGNORE_INDEX)


@pytest.mark.parametrize("name", TASKS)
def test_long_examples_are_built_at_once(name):
    # 0.02 s an example, but a test of speed would measure how busy the machine is.
    batch = LONG[name].at_length(65536).build(0, indices=range(2))
    assert batch.inputs.shape == (2, 65536)
    assert (batch.labels != IGNORE_INDEX).sum() >= 2 * 256


@pytest.mark.parametrize("name", TASKS)
def test_errors_are_those_of_the_task_or_refused(name):
    task = SMALL[name]
    labels = task.build(0).labels
    right = labels[labels != IGNORE_INDEX]
    if task.error_name is None:
        with pytest.raises(NotImplementedError, match=f"task {name} counts right answers only"):
            task.errors(right, right)
    else:
        assert (task.errors(right, right) == 0).all()
        assert (task.errors(np.zeros_like(right), right) > 0).all()
