"""Windows of text as PyTorch data sets: packed in random order, or in the order of their documents.

A document of n tokens has n + 1 positions: the first has the end-of-text token as input and the first token
as target, the last has the last token as input and end-of-text as target. Windows are cut from positions, so
every position of a window has a target, wherever it is cut.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ovq_lab.tasks import IGNORE_INDEX
from ovq_lab.text import Corpus
from ovq_lab.train.config import RunConfig
from ovq_lab.train.needles import NeedleWindows


class PackedTextDataset(Dataset):
    """All windows of a run, in training order: window i belongs to step `i // batch_size`.

    Each epoch concatenates the documents in a new order, cuts the result into windows of the step's length,
    and shuffles the windows. A window may hold parts of several documents; each part is a row of its own in
    `cu_seqlens`, and none sees another. A window depends only on the seed and its index, as in
    `CurriculumDataset`. With needles, texts that contain them replace some of the windows.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, needles: NeedleWindows | None = None) -> None:
        self._train = config.train
        self._corpus = corpus
        self._needles = needles
        self._num_positions = corpus.num_tokens + 1
        num_positions = int(self._num_positions.sum())
        if num_positions < max(config.train.lengths):
            raise ValueError(
                f"train.lengths: expected at most {num_positions}, all tokens of the training documents, "
                f"found {max(config.train.lengths)}"
            )
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        """Windows of the whole run."""
        return self._train.steps * self._train.batch_size

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Build these windows as one packed row: `input_ids`, targets and `cu_seqlens`; no collation is
        needed."""
        return _packed([row for index in indices for row in self._rows(index)])

    def _rows(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        texts = [] if self._needles is None else self._needles.texts(index)
        if texts:
            return [_answers(*text, self._corpus.end_of_text) for text in texts]
        return [read_positions(self._corpus, *piece) for piece in self._window(index)]

    def _window(self, index: int) -> list[tuple[int, int, int]]:
        """The pieces of a window: document, first position and end of each."""
        length = self._train.length_at(index // self._train.batch_size)
        number, place = divmod(index, int(self._num_positions.sum()) // length)
        epoch = self._epochs.get(length)
        if epoch is None or epoch.number != number:
            # One epoch per length is enough, as a run goes through them in order.
            epoch = self._epochs[length] = _Epoch(self._num_positions, length, self._train.seed, number)
        return epoch.window(place)


class _Epoch:
    """The windows of one epoch, for documents with `num_positions` `[D]`."""

    def __init__(self, num_positions: np.ndarray, length: int, seed: int, number: int) -> None:
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(length, number)))
        self.number = number
        self._length = length
        self._documents = random.permutation(len(num_positions))
        self._ends = num_positions[self._documents].cumsum()
        num_windows, num_left = divmod(int(self._ends[-1]), length)
        # A random start, so that the positions left over are not always at the end of the last document.
        self._first = int(random.integers(num_left + 1))
        self._order = random.permutation(num_windows)

    def window(self, place: int) -> list[tuple[int, int, int]]:
        start = self._first + int(self._order[place]) * self._length
        pieces = _pieces(self._ends, start, start + self._length)
        return [(int(self._documents[i]), begin, end) for i, begin, end in pieces]


class HeldOutWindows(Dataset):
    """Windows of documents that are not trained on, each built as in `PackedTextDataset`.

    The documents are concatenated in order and cut into windows, of which `num_windows` (or all, if fewer)
    are taken at even distances. If all documents together are shorter than `length`, so is the window.
    """

    def __init__(self, corpus: Corpus, *, length: int, num_windows: int) -> None:
        self._corpus = corpus
        self._ends = (corpus.num_tokens + 1).cumsum()
        self._length = min(length, int(self._ends[-1]))
        available = int(self._ends[-1]) // self._length
        number = min(num_windows, available)
        self._starts = [i * available // number * self._length for i in range(number)]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._starts)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """Build these windows as one packed row: `input_ids`, targets and `cu_seqlens`."""
        pieces = [
            piece
            for index in indices
            for piece in _pieces(self._ends, self._starts[index], self._starts[index] + self._length)
        ]
        return _packed([read_positions(self._corpus, *piece) for piece in pieces])


class CarriedTextDataset(Dataset):
    """The windows of whole documents in order, for training that carries the state between them.

    An optimizer step has `batch_size` windows, one per lane. A lane reads one document after the other, each
    from its first window to its last, which may be shorter. Window i belongs to lane `i % batch_size`. The
    next document of the epoch goes to the lane that has the least left to read. Lanes depend only on the
    seed, not on the processes that share them.
    """

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._train = config.train
        (self._length,) = config.train.lengths
        self._corpus = corpus
        self._num_positions = corpus.num_tokens + 1
        self._lanes = self._schedule(-(-self._num_positions // self._length))

    def _schedule(self, num_windows: np.ndarray) -> list[tuple[list[int], list[int]]]:
        """For each lane, its documents and the step at which each begins."""
        lanes: list[tuple[list[int], list[int]]] = [([], []) for _ in range(self._train.batch_size)]
        free_at = [(0, lane) for lane in range(self._train.batch_size)]
        number = 0
        while free_at[0][0] < self._train.steps:
            key = np.random.SeedSequence(self._train.seed, spawn_key=(number,))
            for document in np.random.default_rng(key).permutation(len(num_windows)).tolist():
                step, lane = free_at[0]
                lanes[lane][0].append(document)
                lanes[lane][1].append(step)
                heapq.heapreplace(free_at, (step + int(num_windows[document]), lane))
            number += 1
        return lanes

    def __len__(self) -> int:
        """Windows of the whole run."""
        return self._train.steps * self._train.batch_size

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """Build a window.

        Returns:
            `input_ids` and targets `[1, T]`; the `lane`; `num_read`, number of positions of the document
            before the window; `is_last`, whether the document ends in the window.
        """
        (index,) = indices
        step, lane = divmod(index, self._train.batch_size)
        documents, first_steps = self._lanes[lane]
        i = bisect.bisect_right(first_steps, step) - 1
        start = (step - first_steps[i]) * self._length
        end = int(self._num_positions[documents[i]])
        stop = min(start + self._length, end)
        inputs, targets = read_positions(self._corpus, documents[i], start, stop)
        place = {"lane": lane, "num_read": start, "is_last": stop == end}
        return _batch([inputs], [targets]) | place


def _pieces(ends: np.ndarray, start: int, stop: int) -> list[tuple[int, int, int]]:
    """The pieces of a range of concatenated documents: index, first position and end of each.

    Example:
        >>> _pieces(np.array([3, 10, 12]), 1, 11)
        [(0, 1, 3), (1, 0, 7), (2, 0, 1)]
    """
    pieces = []
    i = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        end = int(ends[i])
        begin = 0 if i == 0 else int(ends[i - 1])
        pieces.append((i, start - begin, min(stop, end) - begin))
        start, i = end, i + 1
    return pieces


def _answers(tokens: np.ndarray, is_answer: np.ndarray, end_of_text: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a text; targets outside of answers are ignored."""
    inputs, targets = _positions(tokens, end_of_text)
    return inputs, np.where(np.append(is_answer, False), targets, IGNORE_INDEX)


def read_positions(corpus: Corpus, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of a range of positions of a document, `[stop - start]` int64 each."""
    is_whole = start == 0, stop > corpus.num_tokens[document]
    return _positions(corpus.tokens(document, max(start - 1, 0), stop), corpus.end_of_text, *is_whole)


def _positions(
    tokens: np.ndarray, end_of_text: int, is_first: bool = True, is_last: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets of tokens that begin a text, or end it, or both.

    Example:
        >>> inputs, targets = _positions(np.array([7, 8]), 256)
        >>> inputs.tolist(), targets.tolist()
        ([256, 7, 8], [7, 8, 256])
    """
    parts = [[end_of_text] if is_first else [], tokens, [end_of_text] if is_last else []]
    read = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    return read[:-1], read[1:]


def _packed(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Pack rows into one batch row, with their bounds in `cu_seqlens`."""
    inputs, targets = zip(*rows, strict=True)
    ends = np.cumsum([0, *map(len, inputs)], dtype=np.int32)
    return _batch(inputs, targets) | {"cu_seqlens": torch.from_numpy(ends)}


def _batch(inputs: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Concatenate pieces to one row. Targets have two names: `labels` for the Trainer, `shift_labels` for the
    model."""
    input_ids, shift_labels = (torch.from_numpy(np.concatenate(parts))[None] for parts in (inputs, targets))
    return {"input_ids": input_ids, "labels": shift_labels, "shift_labels": shift_labels}
