"""What trained models are asked: synthetic tasks, the loss on held-out text, needles hidden in it.

These say what is asked; `ovq.research.reproduce.asking` asks it.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from typing import Any

from ovq.research.reproduce.digests import described, digest
from ovq.tasks import Task
from ovq.text import TextSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question(ABC):
    """Something to ask a trained model, in several examples of one length.

    Attributes:
        num_examples: How many examples.
        num_slots: Slots of the dictionary while they are read; `None` for as many as in training.
        seed: Seed of the examples. In a figure it stands for an offset to the seed of the run.

    Raises:
        ValueError: If a number is out of range.
    """

    num_examples: int
    num_slots: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.num_examples < 1 or (self.num_slots is not None and self.num_slots < 1) or self.seed < 0:
            raise ValueError(
                "expected at least one example and one slot, and a seed of at least 0, found "
                f"{self.num_examples}, {self.num_slots} and {self.seed}"
            )

    @property
    @abstractmethod
    def topic(self) -> str:
        """What it is about, in a word, for file names."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens an example."""

    @property
    def name(self) -> str:
        """A file name for the answers: readable, and different for different questions.

        Example:
            >>> from ovq.tasks import RecallTask
            >>> Evaluation(task=RecallTask(length=512), num_examples=4).name
            'recall-512-...'
        """
        return f"{self.topic}-{self.num_tokens}-{digest(described(self))}"

    def as_json(self) -> dict[str, Any]:
        """Every field, as JSON gives it back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(Question):
    """Examples of a synthetic task: how many answers are right?

    Attributes:
        task: The kind of examples, at the length to ask at.
    """

    task: Task

    @property
    def topic(self) -> str:
        """The name of the task."""
        return self.task.name

    @property
    def num_tokens(self) -> int:
        """Tokens an example."""
        return self.task.length

    def as_json(self) -> dict[str, Any]:
        """Every field, and the name of the task."""
        fields = super().as_json()
        return fields | {"task": {"name": self.task.name} | fields["task"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TextQuestion(Question):
    """Something about held-out documents.

    Attributes:
        source: The corpus; its documents for tests are read.
        length: Tokens an example, at most.
    """

    source: TextSource
    length: int

    @property
    def num_tokens(self) -> int:
        """Tokens an example, at most."""
        return self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageEvaluation(_TextQuestion):
    """Windows of held-out documents: how well is each next token predicted?

    Attributes:
        block_size: Positions of the first part that the loss is given for; each later one is as long as all
            before it.
    """

    block_size: int = 1024

    @property
    def topic(self) -> str:
        """Language modelling."""
        return "loss"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleEvaluation(_TextQuestion):
    """Values hidden in held-out documents at one depth: are they found?

    Attributes:
        depth: Where the value is, from 0 (the beginning) to 1 (right before the question).
        value: Kind of value: `"word"`, `"number"` or `"uuid"`.
    """

    depth: float
    value: str = "number"

    @property
    def topic(self) -> str:
        """A needle."""
        return "needle"
