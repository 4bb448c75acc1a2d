"""The examples of a training run as a PyTorch data set: what kind the task needs, and the synthetic one, with
the length curriculum in it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ovq.files import write_atomic
from ovq.report.progress import Reporter
from ovq.tasks import TextTask
from ovq.text import Corpus, get_tokenizer, load_corpus, source_tokenizer
from ovq.train.config import RunConfig
from ovq.train.needles import NeedleWindows
from ovq.train.text import CarriedTextDataset, PackedTextDataset

CORPUS_FILE = "corpus.json"
"""The name of the file that tells what a run was trained on, in its folder."""

_SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What a run trains on.

    Attributes:
        examples: Builds whole batches by index.
        tokenizer: Of real text, to be saved beside the model; None where tokens stand for nothing else.
        is_carrying: Whether the state is carried from one example to the next.
    """

    examples: Dataset
    tokenizer: Any | None = None
    is_carrying: bool = False


def training_data(
    config: RunConfig,
    out: Path,
    checkpoint: Path | None,
    reporter: Reporter,
    *,
    is_resumed: bool = False,
) -> TrainingData:
    """What a run trains on, read or built.

    Args:
        config: The run.
        out: Its folder, in which a new run notes what its corpus is.
        checkpoint: Where the run goes on, whose tokenizer is the one to go on with; None at its beginning.
        reporter: Where to show how much of a corpus has been read, if it is not in the cache.
        is_resumed: Whether the run has been begun before, at its beginning too.

    Raises:
        ValueError: If text cannot be had, there is not enough of it, or it is not what the run began with.
    """
    task = config.task
    if not isinstance(task, TextTask):
        return TrainingData(examples=CurriculumDataset(config))
    tokenizer = source_tokenizer(task) if checkpoint is None else get_tokenizer(str(checkpoint))
    corpus = load_corpus(task, "train", tokenizer=tokenizer, progress=_now_and_then(task.dataset, reporter))
    examples = _text_examples(config, corpus, tokenizer)
    if checkpoint is None and not (is_resumed and (out / CORPUS_FILE).exists()):
        write_atomic(out / CORPUS_FILE, json.dumps({"dataset": task.dataset, "digest": corpus.digest}) + "\n")
    else:
        _check_corpus(out / CORPUS_FILE, corpus)
    return TrainingData(examples=examples, tokenizer=tokenizer, is_carrying=task.carry_state)


def _text_examples(config: RunConfig, corpus: Corpus, tokenizer: Any) -> Dataset:
    """Windows of a corpus, in the order that the run asks for."""
    if config.task.carry_state:
        return CarriedTextDataset(config, corpus)
    needles = NeedleWindows(config, corpus, tokenizer) if config.task.needle_share else None
    return PackedTextDataset(config, corpus, needles)


def _check_corpus(path: Path, corpus: Corpus) -> None:
    """Raise ValueError unless a run goes on with the corpus it began with: windows are known by number."""
    try:
        found = dict(json.loads(path.read_text()))["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what the run was trained on, found none ({error})") from error
    if corpus.digest != found:
        raise ValueError(
            f"{path}: expected the corpus this run began with (digest {found}), "
            f"found one that has changed since ({corpus.digest})"
        )


def _now_and_then(name: str, reporter: Reporter) -> Callable[[int], None]:
    """Says how many documents have been read every few seconds; how many there are is not known before."""
    last_line = time.monotonic()

    def progress(num_documents: int) -> None:
        nonlocal last_line
        if time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            reporter.say(f"read {name}: {num_documents} documents")

    return progress


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
