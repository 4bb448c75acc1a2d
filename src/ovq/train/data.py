"""The examples of a training run as a PyTorch data set, with the length curriculum in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from ovq.train.config import RunConfig


class CurriculumDataset(Dataset):
    """Every example of a run, in the order of training: example i belongs to step `i // batch_size`.

    The index alone says what an example is and how long it is. Read in sequence it therefore resumes at any
    step, and several processes that take batches by turns train on what a single one would.

    Args:
        config: The run.

    Example:
        >>> from ovq.train.recipes import get_recipe
        >>> data = CurriculumDataset(get_recipe("recall-ovq"))
        >>> {name: tuple(tensor.shape) for name, tensor in data.__getitems__([0, 1, 2]).items()}
        {'input_ids': (3, 32), 'labels': (3, 32)}
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._tasks = {length: config.task.at_length(length) for length in config.train.lengths}

    def __len__(self) -> int:
        """Examples of the whole run."""
        return self._config.train.steps * self._config.train.batch_size

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Build these examples at once, as `input_ids` and `labels` of `[B, T]`; nothing is left to do."""
        train = self._config.train
        lengths = {train.length_at(index // train.batch_size) for index in indices}
        assert len(lengths) == 1, f"a batch holds examples of one length, not of {sorted(lengths)}"
        batch = self._tasks[lengths.pop()].build(train.seed, indices=indices, split="train")
        return {"input_ids": torch.from_numpy(batch.inputs), "labels": torch.from_numpy(batch.labels)}
