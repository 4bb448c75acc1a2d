"""Evaluations of trained models: accuracy on synthetic tasks, loss on held-out text, needles hidden in text.

Each kind is a class, with the fields that identify it and the function of `ovq_lab.eval` that it calls. That
function is imported with transformers when it is called, so that figures can be listed without.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from ovq.runtime.progress import WorkReporter
from ovq_lab.figures.digests import described, digest
from ovq_lab.plots.language import octave_losses
from ovq_lab.plots.needle import SCORES
from ovq_lab.tasks import RecallTask, Task
from ovq_lab.text import Corpus, TextSource, load_corpus
from ovq_lab.text.haystack import NeedleBuilder, essay_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ovq.hf import OVQForCausalLM
    from ovq_lab.eval.needle import NeedleRow
    from ovq_lab.eval.rows import NamedRow

_LOSS_FIELDS = (
    *("mixer", "num_slots", "merge", "logn_length", "length", "loss", "bits_per_byte", "state_bytes"),
    *("sawtooth", "sawtooth_error"),
)

_PURPOSES = {"test": "tests", "validation": "validation"}

_LATER: dict[str, Any] = {
    "merge": None,
    "logn_length": None,
    "state_dtype": None,
    "split": "test",
    "needle_values": ["number"],
    "bare_needle_share": 0.0,
}
"""Fields that earlier versions lacked, with their values for outcomes without them."""


def _without_later(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_later(value) if isinstance(value, dict) else value
        for name, value in fields.items()
        if name not in _LATER or value != _LATER[name]
    }


def _without_name(row: NamedRow) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(row).items() if name != "name"}


# Cached, so that texts are loaded once for all lengths and depths.
_essay_texts = functools.lru_cache(maxsize=4)(essay_texts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation(ABC):
    """An evaluation of a trained model on several examples of one length.

    Attributes:
        num_slots: Slots of the dictionary during the evaluation; `None` for as many as in training.
        merge: The merge rule during the evaluation, as in `OVQConfig.merge`; `None` for that of training.
        logn_length: Tokens beyond which logits are scaled, as in `OVQConfig.logn_length`; `None` for the
            model's own setting.
        state_dtype: Format of the slots, as in `OVQConfig.state_dtype`; `None` for float32.
        seed: Seed of the examples. In a figure it is an offset to the seed of the run.
    """

    known_as: ClassVar[str]
    """Name of the kind in file names: unchanged from earlier versions, so that their outcomes are found."""

    judged_by: ClassVar[str] = "accuracy"
    """Field of the outcome that trials are chosen by: the lowest `"loss"`, the highest of all others."""

    num_examples: int
    num_slots: int | None = None
    merge: str | None = None
    logn_length: int | None = None
    state_dtype: str | None = None
    seed: int = 0

    @property
    @abstractmethod
    def topic(self) -> str:
        """A word for file names."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Largest number of tokens per example."""

    @property
    def num_read(self) -> int:
        """Largest number of tokens of all examples together."""
        return self.num_examples * self.num_tokens

    @property
    def num_steps(self) -> int:
        """Number of progress steps, usually one per token."""
        return self.num_read

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError if there is too little data, as far as that can be checked without a model."""

    @abstractmethod
    def evaluate(self, model: OVQForCausalLM, folder: Path, reporter: WorkReporter) -> dict[str, Any]:
        """Evaluate a model; returns the outcome as JSON types.

        Args:
            folder: The folder it was loaded from, with its tokenizer if it reads text.

        Raises:
            ValueError: If the model cannot be evaluated.
        """

    @property
    def name(self) -> str:
        """File name of the outcome: readable, and different for different evaluations.

        Example:
            >>> from ovq_lab.tasks import RecallTask
            >>> TaskEvaluation(task=RecallTask(length=512), num_examples=4).name
            'recall-512-...'
        """
        return f"{self.topic}-{self.num_tokens}-{digest(described(self) | {'class': self.known_as})}"

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON types; fields of `_LATER` only if they differ from their values there."""
        return _without_later(json.loads(json.dumps(dataclasses.asdict(self))))

    def row_fields(self) -> dict[str, Any]:
        """Fields of the evaluation in the rows of a figure, besides those of the outcome."""
        of_outcome = ("seed", "num_slots", "merge")
        return {name: value for name, value in self.as_json().items() if name not in of_outcome}

    @property
    def _dictionary(self) -> dict[str, Any]:
        """The dictionary, as arguments of the functions in `ovq_lab.eval`."""
        return {
            "num_slots": [] if self.num_slots is None else [self.num_slots],
            "merges": [] if self.merge is None else [self.merge],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEvaluation(Evaluation):
    """Accuracy on examples of a synthetic task."""

    known_as: ClassVar[str] = "Evaluation"

    task: Task

    @property
    def topic(self) -> str:
        """The name of the task."""
        return self.task.name

    @property
    def num_tokens(self) -> int:
        """Tokens per example."""
        return self.task.length

    @property
    def num_steps(self) -> int:
        """One step per example."""
        return self.num_examples

    def check(self) -> None:
        """Always passes, as examples are generated."""

    def evaluate(self, model: OVQForCausalLM, folder: Path, reporter: WorkReporter) -> dict[str, Any]:
        """The fields of a `ResultRow`, except the name."""
        from ovq_lab.eval.accuracy import evaluate

        [row] = evaluate(
            model,
            self.task,
            lengths=[self.num_tokens],
            **self._dictionary,
            num_examples=self.num_examples,
            seed=self.seed,
            reporter=reporter,
        )
        return _without_name(row)

    def as_json(self) -> dict[str, Any]:
        """Every field, and the name of the task."""
        fields = super().as_json()
        return fields | {"task": {"name": self.task.name} | fields["task"]}

    def row_fields(self) -> dict[str, Any]:
        """Fields of all evaluations, and the task's counts at its length: pairs, queries, functions."""
        fields = super().row_fields()
        names = (name for name in dir(type(self.task)) if name.startswith("num_"))
        counts = {name: getattr(self.task, name) for name in names}
        return fields | {"task": fields["task"] | {k: v for k, v in counts.items() if isinstance(v, int)}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptEvaluation(TaskEvaluation):
    """Statistics of slots on a recall task; see `ovq_lab.eval.kept`."""

    known_as: ClassVar[str] = "KeptEvaluation"

    def evaluate(self, model: OVQForCausalLM, folder: Path, reporter: WorkReporter) -> dict[str, Any]:
        """The fields of a `KeptRow`."""
        from ovq_lab.eval.kept import evaluate_kept

        assert isinstance(self.task, RecallTask), "other tasks have no pairs"
        assert self.num_slots is not None, "the figure says how many"
        assert self.merge is not None, "the figure says which"
        row = evaluate_kept(
            model,
            self.task,
            num_slots=self.num_slots,
            merge=self.merge,
            num_examples=self.num_examples,
            seed=self.seed,
            reporter=reporter,
        )
        return dataclasses.asdict(row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TextEvaluation(Evaluation):
    """An evaluation on held-out documents.

    Attributes:
        split: The documents used: `"test"`, or `"validation"` to choose between trials.
    """

    source: TextSource
    length: int
    split: str = "test"

    @property
    def num_tokens(self) -> int:
        return self.length


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossEvaluation(_TextEvaluation):
    """Next-token loss on windows of held-out documents.

    Attributes:
        block_size: Positions of the first part with a loss of its own; each later part is as long as all
            before it.
    """

    known_as: ClassVar[str] = "LanguageEvaluation"
    topic: ClassVar[str] = "loss"
    judged_by: ClassVar[str] = "loss"

    block_size: int = 1024

    def check(self) -> None:
        """Check that there are enough windows."""
        self._windows()

    def evaluate(self, model: OVQForCausalLM, folder: Path, reporter: WorkReporter) -> dict[str, Any]:
        """The fields of a `LanguageRow`, except the many losses of single windows."""
        from transformers import AutoTokenizer

        from ovq_lab.eval.language import evaluate_language
        from ovq_lab.eval.reading import token_bytes

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        corpus = self._windows(tokenizer)
        [row] = evaluate_language(
            model,
            corpus,
            lengths=[self.length],
            **self._dictionary,
            num_windows=self.num_examples,
            block_size=self.block_size,
            bytes_of_tokens=token_bytes(tokenizer),
            first_token=corpus.end_of_text,
            reporter=reporter,
        )
        return {
            **{name: getattr(row, name) for name in _LOSS_FIELDS},
            "position_losses": {str(last): loss for _, last, loss in octave_losses(row)},
        }

    def _windows(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Corpus:
        corpus = load_corpus(self.source, self.split, tokenizer=tokenizer)
        # An end-of-text token is put before each document, and windows do not overlap.
        found = int(((corpus.num_tokens + 1) // self.length).sum())
        if found < self.num_examples:
            raise ValueError(
                f"{self.source.dataset}: expected {self.num_examples} windows of {self.length} tokens in the "
                f"documents held out for {_PURPOSES[self.split]}, found {found}; hold out more than "
                f"{self.source.held_out:g} of the corpus (held_out)"
            )
        return corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HiddenValues(_TextEvaluation):
    value: str

    def check(self) -> None:
        self._texts()

    def _texts(self) -> list[str]:
        return _essay_texts(self.source, self.split, self.length)

    def _rows(
        self,
        model: OVQForCausalLM,
        folder: Path,
        reporter: WorkReporter,
        *,
        haystack: str,
        depths: Sequence[float],
    ) -> list[NeedleRow]:
        from transformers import AutoTokenizer

        from ovq_lab.eval.needle import evaluate_needle

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return evaluate_needle(
            model,
            NeedleBuilder(tokenizer, haystack=haystack, value=self.value, texts=self._texts()),
            lengths=[self.length],
            depths=depths,
            **self._dictionary,
            num_examples=self.num_examples,
            seed=self.seed,
            reporter=reporter,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleEvaluation(_HiddenValues):
    """Retrieval of values hidden in held-out documents at one depth.

    Attributes:
        depth: Relative position of the value, from 0 (the beginning) to 1 (right before the question).
    """

    known_as: ClassVar[str] = "NeedleEvaluation"
    topic: ClassVar[str] = "needle"

    value: str = "number"
    depth: float

    def evaluate(self, model: OVQForCausalLM, folder: Path, reporter: WorkReporter) -> dict[str, Any]:
        """The fields of a `NeedleRow`, except the name."""
        [row] = self._rows(model, folder, reporter, haystack="essay", depths=[self.depth])
        return _without_name(row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedlesEvaluation(_HiddenValues):
    """Retrieval of values hidden at several depths, in noise or in held-out documents.

    Attributes:
        haystack: Kind of text around the value: `"noise"` or `"essay"`.
        depths: Relative positions of the values, from 0 to 1, with `num_examples` each.
    """

    known_as: ClassVar[str] = "NeedlesEvaluation"
    judged_by: ClassVar[str] = "token_accuracy"

    haystack: str
    depths: tuple[float, ...]

    @property
    def topic(self) -> str:
        """The value and the text around it."""
        return f"{self.value}-in-{self.haystack}"

    @property
    def num_read(self) -> int:
        """Tokens of the examples at all depths."""
        return super().num_read * len(self.depths)

    def evaluate(self, model: OVQForCausalLM, folder: Path, reporter: WorkReporter) -> dict[str, Any]:
        """Each score of a `NeedleRow` as mean over depths, and the scores at each depth."""
        rows = self._rows(model, folder, reporter, haystack=self.haystack, depths=self.depths)
        return {
            **{
                name: getattr(rows[0], name)
                for name in ("mixer", "num_slots", "merge", "logn_length", "state_bytes")
            },
            **{name: fmean(getattr(row, name) for row in rows) for name in SCORES},
            "by_depth": {f"{row.depth:g}": row.generated for row in rows},
        }

    def _texts(self) -> list[str]:
        return super()._texts() if self.haystack == "essay" else []
