"""Base of all synthetic tasks: the batches they build, their random streams, and how they change length.

A task is a frozen dataclass whose fields describe the data. Its `build` makes any example from a seed and an
index alone. Nothing is stored, and nothing depends on the order in which examples are requested. A training
run can therefore skip to any step, several processes can share one data set, and an evaluation can be
repeated exactly.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, TypeVar

import numpy as np

from ovq.fields import check_fields

IGNORE_INDEX = -100
"""Label of tokens without a loss (PyTorch's and Hugging Face's convention)."""

SPLITS = ("train", "test")
"""The two families of random streams: no seed or index of one gives a stream of the other."""

TaskT = TypeVar("TaskT", bound="Task")


class TaskBatch(NamedTuple):
    """A batch of B examples of T tokens.

    Attributes:
        inputs: `[B, T]` int64, the token ids.
        labels: `[B, T]` int64, aligned with `inputs` (the model shifts them); `IGNORE_INDEX` at tokens that
            are not asked for.
        slices: Name -> `[B, T]` bool. Each mask selects some of the labelled tokens, so that a report can
            tell easy questions from hard ones. All examples of a task have the same names in the same order.
    """

    inputs: np.ndarray
    labels: np.ndarray
    slices: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A family of examples of one length.

    Attributes:
        name: Name of the task in configurations and reports.
        error_name: Name of the quantity that `errors` returns; `None` if answers are just right or wrong.
        length: Tokens per example, T.
        vocab_size: Number of token ids; all ids are smaller.

    Raises:
        ValueError: If a field is not of its type, or a number is not finite.
    """

    name: ClassVar[str]
    error_name: ClassVar[str | None] = None
    length: int = 256
    vocab_size: int = 512

    def __post_init__(self) -> None:
        """Check the types; the tasks themselves check the ranges."""
        check_fields(self)

    @abstractmethod
    def build(self, seed: int, *, indices: Sequence[int] = (0,), split: str = "train") -> TaskBatch:
        """Build the examples with these indices; each depends only on `(seed, index, split)`.

        Args:
            seed: Non-negative; each seed gives a different data set.
            indices: Non-negative indices of the B examples within the data set.
            split: `"train"` or `"test"`.

        Raises:
            ValueError: If `split` is unknown, or `seed` or an index is negative.
        """

    def errors(self, answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Error of each answer, for tasks that have an `error_name`.

        Args:
            answers: Token ids, of any shape.
            labels: The right token ids, of the same shape.

        Returns:
            Floats of the same shape, 0 for a right answer.
        """
        raise NotImplementedError(f"task {self.name} counts right answers only")

    def at_length(self: TaskT, length: int) -> TaskT:
        """The same task with examples of another length.

        Raises:
            ValueError: If the other fields do not fit into an example of that length.
        """
        return dataclasses.replace(self, length=length)


def example_generator(seed: int, index: int, *, split: str) -> np.random.Generator:
    """The random stream of one example.

    The split is part of the stream's key, not of the seed, so train and test data are disjoint whatever seeds
    are chosen.

    Raises:
        ValueError: If `split` is unknown, or `seed` or `index` is negative.

    Example:
        >>> splits = ("train", "train", "test")
        >>> draws = [int(example_generator(0, 5, split=split).integers(1000)) for split in splits]
        >>> draws[0] == draws[1], draws[0] == draws[2]
        (True, False)
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, found {split!r}")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index: expected non-negative integers, found {seed} and {index}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index)))
