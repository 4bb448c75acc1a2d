"""Accuracy of a model on a task, at any length, with any number of slots and any merge rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ovq.hf import OVQForCausalLM
from ovq.runtime.progress import WorkReporter
from ovq_lab.eval.dictionaries import dictionaries_to_test, each_dictionary
from ovq_lab.eval.models import row_fields
from ovq_lab.eval.rows import ResultRow
from ovq_lab.tasks import IGNORE_INDEX, Task, TaskBatch

TOKENS_PER_BATCH = 16384
"""Most tokens per micro-batch: enough to keep a few cores busy."""


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
    name: str = "",
) -> list[ResultRow]:
    """Evaluate a model on a task, at several lengths and with several dictionaries.

    Args:
        model: Evaluated on its device and in its dtype; its dictionary is restored afterwards.
        task: The kind of data; its own length is ignored.
        lengths: Tokens per example, one test for each.
        num_slots: Sizes of the dictionary to test, see `dictionaries_to_test`.
        merges: Merge rules to test, likewise.
        num_examples: Examples per length: one number for all lengths, or one for each.

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
    check_vocabulary(model, task)
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
            batch_size = max(1, TOKENS_PER_BATCH // at_length.length)
            # One array per batch, with an entry per asked token.
            right, errors, slices = [], [], []
            for first in range(0, count, batch_size):
                indices = range(first, min(first + batch_size, count))
                batch = at_length.build(seed, indices=indices, split="test")
                is_asked = batch.labels != IGNORE_INDEX
                answers, labels = answers_of(model, batch), batch.labels[is_asked]
                right.append(answers == labels)
                if at_length.error_name is not None:
                    errors.append(at_length.errors(answers, labels))
                slices.append({name: mask[is_asked] for name, mask in batch.slices.items()})
                accuracy = np.concatenate(right).mean()
                note = f"{dictionary.note}length {at_length.length}, accuracy {accuracy:.3f}"
                work.update(done + indices[-1] + 1, note=note)
            done += count
            masks = {name: np.concatenate([each[name] for each in slices]) for name in slices[0]}
            accuracy, by_slice = _means(right, masks)
            mean_error, slice_errors = _means(errors, masks) if errors else (None, {})
            rows.append(
                ResultRow(
                    name=name,
                    **row_fields(model, dictionary, at_length.length),
                    accuracy=accuracy,
                    num_questions=sum(map(len, right)),
                    slices=by_slice,
                    mean_error=mean_error,
                    slice_errors=slice_errors,
                )
            )
    return rows


def check_vocabulary(model: OVQForCausalLM, task: Task) -> None:
    """Raise ValueError unless the model knows all tokens of the task."""
    if task.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"expected a task of at most {model.config.vocab_size} token ids, as the model knows, "
            f"found {task.vocab_size}"
        )


def _means(batches: Sequence[np.ndarray], masks: dict[str, np.ndarray]) -> tuple[float, dict[str, float]]:
    """Mean over all asked tokens, and over those of each non-empty slice."""
    values = np.concatenate(batches)
    return float(values.mean()), {
        name: float(values[mask].mean()) for name, mask in masks.items() if mask.any()
    }


def answers_of(model: OVQForCausalLM, batch: TaskBatch) -> np.ndarray:
    """The most likely token at each asked position, given the tokens before it, in row-major order."""
    is_asked = torch.from_numpy(batch.labels != IGNORE_INDEX)
    hidden = model.base_model(
        torch.from_numpy(batch.inputs).to(model.device), use_cache=False
    ).last_hidden_state
    # The answer at t is predicted at t - 1. Logits are computed for asked tokens only; for all tokens they
    # would be by far the largest tensor.
    asked_states = hidden[:, :-1][is_asked[:, 1:].to(model.device)]
    return model.get_output_embeddings()(asked_states).argmax(-1).cpu().numpy()
