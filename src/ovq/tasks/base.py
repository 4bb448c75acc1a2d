"""What every synthetic task shares: the batch it builds, its random streams and how it changes length.

A task is a frozen dataclass whose fields describe the data, and whose `build` makes any example of it from a
seed and an index alone. Nothing is stored and nothing depends on the order in which examples are asked for,
so a training run can skip to any step, several processes can share one data set, and an evaluation can be
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
"""The label of a token that no loss is taken on (PyTorch's and Hugging Face's convention)."""

SPLITS = ("train", "test")
"""The two families of random streams. No seed and no index of one yields a stream of the other."""

TaskT = TypeVar("TaskT", bound="Task")


class TaskBatch(NamedTuple):
    """A batch of B examples of T tokens.

    Attributes:
        inputs: `[B, T]` int64, the token ids.
        labels: `[B, T]` int64, aligned with `inputs` (the model shifts them), `IGNORE_INDEX` where nothing is
            asked.
        slices: Name -> `[B, T]` bool. Each mask picks some of the labelled tokens, for a report that tells
            easy questions from hard ones. Names and their order are the same for all examples of a task.
    """

    inputs: np.ndarray
    labels: np.ndarray
    slices: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A family of examples of one length.

    Attributes:
        name: What configurations and reports call the task.
        error_name: What `errors` measures; `None` where an answer is right or wrong and nothing between.
        length: Tokens an example, T.
        vocab_size: Number of token ids; all ids are smaller.

    Raises:
        ValueError: If a field is not of its type, or a number not finite.
    """

    name: ClassVar[str]
    error_name: ClassVar[str | None] = None
    length: int = 256
    vocab_size: int = 512

    def __post_init__(self) -> None:
        """Check the types; tasks check the ranges."""
        check_fields(self)

    @abstractmethod
    def build(self, seed: int, *, indices: Sequence[int] = (0,), split: str = "train") -> TaskBatch:
        """Build the examples with these indices; each depends on `(seed, index, split)` and on nothing else.

        Args:
            seed: Non-negative; another seed is another data set.
            indices: Which examples of the data set, B of them, each non-negative.
            split: `"train"` or `"test"`.

        Returns:
            The batch: inputs, labels and slices.
        """

    def errors(self, answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """How wrong answers are, for tasks that have an `error_name`.

        Args:
            answers: Token ids, of any shape.
            labels: The right ones, of the same shape.

        Returns:
            Floats of the same shape, 0 for a right answer.
        """
        raise NotImplementedError(f"task {self.name} counts right answers only")

    def at_length(self: TaskT, length: int) -> TaskT:
        """The same task with examples of another length.

        Raises:
            ValueError: If an example of that length cannot hold what the other fields ask for.
        """
        return dataclasses.replace(self, length=length)


def example_generator(seed: int, index: int, *, split: str) -> np.random.Generator:
    """The random stream of one example.

    The split is part of the stream's key rather than of the seed, so train and test data are disjoint
    whatever seeds a user picks.

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
