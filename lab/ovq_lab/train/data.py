"""The examples of a training run as a PyTorch data set: text, or a synthetic task with a curriculum."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ovq.runtime.files import read_json, write_atomic
from ovq.runtime.progress import AnyReporter
from ovq_lab.tasks import Task, TextTask
from ovq_lab.text import Corpus, get_tokenizer, load_corpus, source_tokenizer
from ovq_lab.text.corpus import say_progress
from ovq_lab.train.config import RunConfig
from ovq_lab.train.needles import NeedleWindows
from ovq_lab.train.sharding import is_first_process
from ovq_lab.train.text import CarriedTextDataset, HeldOutWindows, PackedTextDataset

CORPUS_FILE = "corpus.json"
"""Name of the file in the folder of a run that identifies its corpus and the documents trained on."""

# Windows of held-out text per evaluation.
_NUM_HELD_OUT = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The data that a run trains on.

    Attributes:
        tokenizer: The tokenizer of real text, to be saved beside the model; None for synthetic tasks.
        held_out: Windows of text for evaluation during training; None for no evaluation.
    """

    examples: Dataset
    tokenizer: Any | None = None
    held_out: Dataset | None = None


def training_data(
    config: RunConfig,
    out: Path,
    checkpoint: Path | None,
    reporter: AnyReporter,
    *,
    is_resumed: bool = False,
) -> TrainingData:
    """Load or build the data that a run trains on.

    Args:
        out: Its folder, in which a new run records the digest of its corpus.
        checkpoint: The checkpoint that the run continues from, whose tokenizer is used; None at its
            beginning.
        is_resumed: Whether the run was started before, even if it begins at step 0 again.

    Raises:
        ValueError: If there is no text, too little of it, or other text than the run began with.
    """
    task = config.task
    if not isinstance(task, TextTask):
        return TrainingData(examples=CurriculumDataset(config))
    tokenizer = source_tokenizer(task) if checkpoint is None else get_tokenizer(str(checkpoint))
    corpus = load_corpus(task, "train", tokenizer=tokenizer, progress=say_progress(task.dataset, reporter))
    if task.carry_state:
        examples: Dataset = CarriedTextDataset(config, corpus)
    else:
        needles = NeedleWindows(config, corpus, tokenizer) if task.needle_share else None
        examples = PackedTextDataset(config, corpus, needles)
    is_new = checkpoint is None and not (is_resumed and (out / CORPUS_FILE).exists())
    if not is_new:
        check_corpus(out / CORPUS_FILE, corpus)
    elif is_first_process():
        longest = 0
        if corpus.num_in_splits["test"]:
            # With the token before it.
            longest = 1 + int(load_corpus(task, "test", tokenizer=tokenizer).num_tokens.max())
        about = {"dataset": task.dataset, "digest": corpus.digest, "longest_test_text": longest}
        begun_with = config.train.init_from
        before = trained_documents(Path(begun_with)) if begun_with else frozenset()
        if before is not None:
            about["trained_on"] = sorted(before.union(corpus.digests))
        # Other processes may get here before the first has created the folder.
        write_atomic(out / CORPUS_FILE, json.dumps(about) + "\n")
    held_out = None
    if config.train.eval_every:
        held_out = HeldOutWindows(
            load_corpus(task, "validation", tokenizer=tokenizer),
            length=max(config.train.lengths),
            num_windows=_NUM_HELD_OUT,
        )
    if is_new and is_first_process():
        reporter.say(_described_splits(task, corpus))
    return TrainingData(examples=examples, tokenizer=tokenizer, held_out=held_out)


def _described_splits(task: TextTask, corpus: Corpus) -> str:
    """The documents of each split; without any for a test, how to get some."""
    sizes = ", ".join(f"{number:,} for {name}" for name, number in corpus.num_in_splits.items())
    if corpus.num_in_splits["test"]:
        return f"{task.dataset}: documents: {sizes}"
    return (
        f"{task.dataset}: warning: no document is left to test the model on ({sizes}); "
        f"a larger task.held_out than {task.held_out:g} leaves some"
    )


def longest_test_text(out: Path) -> int | None:
    """Tokens of the longest text that the run in a folder left for a test, 0 if it left none; None if it did
    not record that, as runs of earlier versions."""
    return read_json(out / CORPUS_FILE).get("longest_test_text")


def trained_documents(folder: Path) -> frozenset[str] | None:
    """Digests of the documents that the run of a folder was trained on, and the model that it began with;
    None if they are not recorded, as by earlier versions and in published folders."""
    path = (folder.parent if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else folder) / CORPUS_FILE
    found = read_json(path).get("trained_on") if path.is_file() else None
    return None if found is None else frozenset(found)


def check_corpus(path: Path, corpus: Corpus) -> None:
    """Raise ValueError unless the corpus is that of the run, whose digest is in `path`.

    Windows are identified by number, so no other corpus will do.
    """
    try:
        found = dict(read_json(path))["digest"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected the digest of the run's corpus, found none ({error})") from error
    if corpus.digest != found:
        raise ValueError(
            f"{path}: expected the corpus of this run (digest {found}), "
            f"found one that has changed since ({corpus.digest})"
        )


class CurriculumDataset(Dataset):
    """All examples of a run, in training order: example i belongs to step `i // batch_size`.

    An example and its length depend only on its index. A run can therefore resume at any step, and several
    processes that take batches in turn train on the same examples as a single process.
    """

    def __init__(self, config: RunConfig) -> None:
        assert isinstance(config.task, Task)
        self._config = config
        self._tasks = {length: config.task.at_length(length) for length in config.train.lengths}

    def __len__(self) -> int:
        """Number of examples of the whole run."""
        return self._config.train.steps * self._config.train.batch_size

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Build these examples together, as `input_ids` and `labels` of `[B, T]`; no collation is needed."""
        train = self._config.train
        lengths = {train.length_at(index // train.batch_size) for index in indices}
        assert len(lengths) == 1, f"a batch holds examples of one length, not of {sorted(lengths)}"
        batch = self._tasks[lengths.pop()].build(train.seed, indices=indices, split="train")
        return {"input_ids": torch.from_numpy(batch.inputs), "labels": torch.from_numpy(batch.labels)}
