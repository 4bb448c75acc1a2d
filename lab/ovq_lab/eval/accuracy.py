"""Accuracy of a model on a task, at any length, with any number of slots and any merge rule."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from ovq.hf import OVQForCausalLM
from ovq.runtime.progress import AnyWork, WorkReporter
from ovq_lab.eval.dictionaries import Dictionary, dictionaries_to_test, each_dictionary
from ovq_lab.eval.models import long_range_mixer
from ovq_lab.eval.rows import ResultRow
from ovq_lab.tasks import IGNORE_INDEX, Task, TaskBatch

TOKENS_PER_BATCH = 16384
"""Tokens per micro-batch, at most: enough to keep a few cores busy."""


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
        merges: Merge rules to test, as `OVQConfig.merge` names them; if empty, the one
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
    if "ovq" not in model.config.mixer_types and (num_slots or merges):
        raise ValueError(
            "num_slots, merges: expected a model with 'ovq' layers, found mixer_types "
            f"{model.config.mixer_types}"
        )
    tested = dictionaries_to_test(model.config, num_slots=num_slots, merges=merges)
    work = reporter.start(label, total=len(tested) * sum(counts))
    rows: list[ResultRow] = []
    done = 0
    for dictionary in each_dictionary(model, tested):
        for at_length, count in zip(tasks, counts, strict=True):
            rows.append(_evaluate_at(model, at_length, dictionary, count, seed, work=work, done=done))
            done += count
    return rows


def _evaluate_at(
    model: OVQForCausalLM,
    task: Task,
    dictionary: Dictionary,
    num_examples: int,
    seed: int,
    *,
    work: AnyWork,
    done: int,
) -> ResultRow:
    """One row: all test examples of one length, with the current dictionary."""
    batch_size = max(1, TOKENS_PER_BATCH // task.length)
    tally = _Tally()
    for first in range(0, num_examples, batch_size):
        indices = range(first, min(first + batch_size, num_examples))
        tally.add(model, task, task.build(seed, indices=indices, split="test"))
        accuracy = tally.right / tally.asked
        note = f"{dictionary.note}length {task.length}, accuracy {accuracy:.3f}"
        work.update(done + indices[-1] + 1, note=note)
    asked_slices = {name: asked for name, asked in tally.asked_by_slice.items() if asked}
    has_errors = task.error_name is not None
    return ResultRow(
        mixer=long_range_mixer(model.config),
        num_slots=dictionary.num_slots,
        merge=dictionary.merge,
        logn_length=model.config.logn_length,
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
        answers, labels = answers_of(model, batch), batch.labels[is_asked]
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


def answers_of(model: OVQForCausalLM, batch: TaskBatch) -> np.ndarray:
    """The most likely token at each asked place, given what precedes it, in order of rows and places."""
    is_asked = torch.from_numpy(batch.labels != IGNORE_INDEX)
    hidden = model.base_model(
        torch.from_numpy(batch.inputs).to(model.device), use_cache=False
    ).last_hidden_state
    # The answer at t is predicted at t - 1. Logits are computed for asked tokens only; for all tokens they
    # would be by far the largest tensor.
    asked_states = hidden[:, :-1][is_asked[:, 1:].to(model.device)]
    return model.get_output_embeddings()(asked_states).argmax(-1).cpu().numpy()
