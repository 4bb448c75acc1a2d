"""Accuracy of a model on a task, at any length, with any number of slots and any rule of keeping them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from ovq.eval.rows import MERGE_NAMES, ResultRow
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.runtime.progress import AnyWork, WorkReporter
from ovq.tasks import IGNORE_INDEX, Task, TaskBatch

_TOKENS_PER_BATCH = 16384
"""Tokens per micro-batch, at most: enough to keep a few cores busy."""


def long_range_mixer(config: OVQConfig) -> str:
    """The mixer that a model is named by: its last mixer that is not a window, or the window if it has no
    other.

    Example:
        >>> long_range_mixer(OVQConfig(num_hidden_layers=2, mixer_types=["sliding_attention", "ovq"]))
        'ovq'
    """
    others = [name for name in config.mixer_types if name != "sliding_attention"]
    return others[-1] if others else config.mixer_types[-1]


@torch.no_grad()
def evaluate(
    model: OVQForCausalLM,
    task: Task,
    *,
    lengths: Sequence[int],
    num_slots: Sequence[int] = (),
    merges: Sequence[str] = (),
    num_examples: int | Sequence[int] = 64,
    seed: int = 0,
    reporter: WorkReporter,
    label: str = "test",
) -> list[ResultRow]:
    """Test a model on a task, at several lengths and with several dictionaries.

    Args:
        model: Tested on the device and in the dtype that it has; its dictionary is restored afterwards.
        task: The kind of data; its own length is ignored.
        lengths: Tokens per example, one test for each.
        num_slots: Sizes of the dictionary to test; if empty, the one that the model has.
        merges: Rules of keeping the dictionary to test, as `OVQConfig.merge` names them; if empty, the one
            that the model has. The model's own rule keeps its growth, the others have the growth that they
            are meant for.
        num_examples: Examples per length: one number for all lengths, or one for each.
        seed: Seed of the test data.
        reporter: Shows the progress.
        label: The name of this test in the progress.

    Returns:
        One row for each number of slots, each rule and each length, in that order.

    Raises:
        ValueError: If the task cannot be built at a length, a number is below 1, the task has tokens that the
            model does not know, `num_slots` or `merges` is given for a model without a dictionary, or a rule
            does not exist or does not fit the model.
    """
    counts = [num_examples] * len(lengths) if isinstance(num_examples, int) else list(num_examples)
    if not lengths or len(counts) != len(lengths) or min(counts) < 1:
        raise ValueError(
            f"expected lengths and at least one example for each, found {list(lengths)} and {num_examples}"
        )
    if task.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"expected a task of at most {model.config.vocab_size} token ids, as the model knows, "
            f"found {task.vocab_size}"
        )
    tasks = [task.at_length(length) for length in lengths]
    config = model.config
    has_slots = "ovq" in config.mixer_types
    own = (config.num_slots, config.merge) if has_slots else (None, None)
    dictionaries = [(slots, merge) for slots in num_slots or own[:1] for merge in merges or own[1:]]
    work = reporter.start(label, total=len(dictionaries) * sum(counts))
    rows: list[ResultRow] = []
    done = 0
    with _put_back(model):
        growths = {own[1]: config.growth}
        for slots, merge in dictionaries:
            if num_slots and slots is not None:
                model.set_num_slots(slots)
            if merges and merge is not None:
                model.set_merge(merge, growth=growths.get(merge))
            for at_length, count in zip(tasks, counts, strict=True):
                row = _evaluate_at(model, at_length, slots, merge, count, seed, work=work, done=done)
                rows.append(row)
                done += count
    return rows


@contextmanager
def _put_back(model: OVQForCausalLM) -> Iterator[None]:
    """Evaluation mode; afterwards the mode and the dictionary that the model had."""
    config, was_training = model.config, model.training
    num_slots = config.num_slots
    merge, growth = config.merge, config.growth
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        if config.num_slots != num_slots:
            model.set_num_slots(num_slots)
        if (config.merge, config.growth) != (merge, growth):
            model.set_merge(merge, growth=growth)


def _evaluate_at(
    model: OVQForCausalLM,
    task: Task,
    num_slots: int | None,
    merge: str | None,
    num_examples: int,
    seed: int,
    *,
    work: AnyWork,
    done: int,
) -> ResultRow:
    """One row: all test examples of one length, with the current dictionary."""
    batch_size = max(1, _TOKENS_PER_BATCH // task.length)
    rule = f"{MERGE_NAMES[merge]}, " if merge in MERGE_NAMES else ""
    slots = "" if num_slots is None else f"{num_slots} slots, "
    tally = _Tally()
    for first in range(0, num_examples, batch_size):
        indices = range(first, min(first + batch_size, num_examples))
        tally.add(model, task, task.build(seed, indices=indices, split="test"))
        accuracy = tally.right / tally.asked
        note = f"{rule}{slots}length {task.length}, accuracy {accuracy:.3f}"
        work.update(done + indices[-1] + 1, note=note)
    asked_slices = {name: asked for name, asked in tally.asked_by_slice.items() if asked}
    has_errors = task.error_name is not None
    return ResultRow(
        mixer=long_range_mixer(model.config),
        num_slots=num_slots,
        merge=merge,
        length=task.length,
        accuracy=tally.right / tally.asked,
        state_bytes=model.state_bytes(task.length),
        num_questions=tally.asked,
        slices={name: tally.right_by_slice[name] / asked for name, asked in asked_slices.items()},
        mean_error=tally.error / tally.asked if has_errors else None,
        slice_errors={name: tally.error_by_slice[name] / asked for name, asked in asked_slices.items()}
        if has_errors
        else {},
    )


class _Tally:
    """Asked tokens, right answers and errors, in total and by slice, summed over batches."""

    def __init__(self) -> None:
        self.asked, self.right, self.error = 0, 0, 0.0
        self.asked_by_slice: Counter[str] = Counter()
        self.right_by_slice: Counter[str] = Counter()
        self.error_by_slice: defaultdict[str, float] = defaultdict(float)

    def add(self, model: OVQForCausalLM, task: Task, batch: TaskBatch) -> None:
        """Answer the questions of a batch, and count."""
        is_asked = batch.labels != IGNORE_INDEX
        answers, labels = _answer(model, batch), batch.labels[is_asked]
        is_right = answers == labels
        errors = np.zeros(len(labels)) if task.error_name is None else task.errors(answers, labels)
        self.asked += len(labels)
        self.right += int(is_right.sum())
        self.error += float(errors.sum())
        for name, mask in batch.slices.items():
            in_slice = mask[is_asked]
            self.asked_by_slice[name] += int(in_slice.sum())
            self.right_by_slice[name] += int(is_right[in_slice].sum())
            self.error_by_slice[name] += float(errors[in_slice].sum())


def _answer(model: OVQForCausalLM, batch: TaskBatch) -> np.ndarray:
    """The most likely token at each asked place, given what precedes it, in order of rows and places."""
    is_asked = torch.from_numpy(batch.labels != IGNORE_INDEX)
    hidden = model.base_model(
        torch.from_numpy(batch.inputs).to(model.device), use_cache=False
    ).last_hidden_state
    # The answer at t is predicted at t - 1. Logits are computed for asked tokens only; for all tokens they
    # would be by far the largest tensor.
    asked_states = hidden[:, :-1][is_asked[:, 1:].to(model.device)]
    return model.get_output_embeddings()(asked_states).argmax(-1).cpu().numpy()
