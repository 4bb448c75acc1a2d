"""Loss of language models on long documents: by position, by position in a chunk, in bits per byte.

Run it as `ovq eval lm --model DIR --dataset NAME --lengths 4096,65536`.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ovq.runtime.progress import WorkReporter
from ovq_lab.eval.dictionaries import dictionaries_to_test, each_dictionary
from ovq_lab.eval.models import (
    check_logits,
    chunk_size_of,
    long_range_mixer,
    row_fields,
)
from ovq_lab.eval.reading import PIECE_SIZE, token_losses
from ovq_lab.eval.rows import NamedRow, model_label
from ovq_lab.text import Corpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageRow(NamedRow):
    """The loss of one model on windows of one length.

    A position is that of the last token read: the loss at p is the loss on token p + 1.

    Attributes:
        num_windows: Number of windows, the same for all models on the same documents.
        loss: Mean over all positions of all windows, in nats per token.
        bits_per_byte: The loss in bits per byte of text; `None` if the bytes are not known.
        tokens_per_second: Tokens read per second of wall-clock time, including the losses.
        window_losses: For each window, the mean loss of each block of positions, first block first.
        chunk_size: Tokens per chunk of the OVQ layers, C; the config's for models without them.
        phase_losses: Mean loss by position modulo C; empty if the windows hold no whole chunk to evaluate.
        sawtooth: Mean loss in the second half of a chunk minus that in the first half; 0 if the ends of
            chunks have no effect. `None` without whole chunks, or with chunks of one token.
        sawtooth_error: Standard error of `sawtooth` over chunks; `None` for fewer than two of them.
    """

    num_windows: int
    loss: float
    bits_per_byte: float | None
    tokens_per_second: float
    block_size: int
    window_losses: tuple[tuple[float, ...], ...]
    chunk_size: int
    phase_losses: tuple[float, ...]
    sawtooth: float | None
    sawtooth_error: float | None

    @property
    def block_losses(self) -> tuple[float, ...]:
        """Mean loss of each block of positions, over all windows."""
        return tuple(fmean(block) for block in zip(*self.window_losses, strict=True))


def take_windows(
    documents: Sequence[np.ndarray] | Corpus, length: int, most: int, *, first_token: int | None = None
) -> list[np.ndarray]:
    """Non-overlapping windows of documents: first the beginnings, then the parts that follow.

    Args:
        first_token: A token put before each document, if any; it counts as one of its tokens.

    Example:
        >>> [window.tolist() for window in take_windows([np.arange(5), np.arange(10, 13)], 2, 3)]
        [[0, 1], [10, 11], [2, 3]]
        >>> [window.tolist() for window in take_windows([np.arange(5)], 2, 3, first_token=256)]
        [[256, 0], [1, 2], [3, 4]]
    """
    if length < 2 or most < 1:
        raise ValueError(f"expected at least 1 window of at least 2 tokens, found {most} of {length}")
    before = np.array([] if first_token is None else [first_token], dtype=np.int64)
    if isinstance(documents, Corpus):
        # Only the windows are read.
        sizes, read = documents.num_tokens.tolist(), documents.tokens
    else:
        sizes, read = [*map(len, documents)], lambda index, start, stop: documents[index][start:stop]
    longest = max((len(before) + size for size in sizes), default=0)
    if longest < length:
        raise ValueError(
            f"length: expected at most {longest}, the tokens of the longest document, found {length}"
        )
    windows = (
        np.concatenate([before, read(i, 0, length - len(before))])
        if first == 0
        else read(i, first - len(before), first - len(before) + length)
        for first in range(0, longest - length + 1, length)
        for i, size in enumerate(sizes)
        if len(before) + size >= first + length
    )
    return list(itertools.islice(windows, most))


def evaluate_language(
    model: PreTrainedModel,
    documents: Sequence[np.ndarray] | Corpus,
    *,
    lengths: Sequence[int],
    num_slots: Sequence[int] = (),
    merges: Sequence[str] = (),
    num_windows: int = 8,
    block_size: int = 1024,
    piece_size: int = PIECE_SIZE,
    bytes_of_tokens: np.ndarray | None = None,
    first_token: int | None = None,
    reporter: WorkReporter,
    name: str = "",
) -> list[LanguageRow]:
    """Measure the loss on windows of documents, at several lengths and with several dictionaries.

    Args:
        model: A model of this library, a converted one, or a causal language model of transformers;
            evaluated on its device and in its dtype; its dictionary is restored afterwards.
        documents: `[T]` token ids of each.
        lengths: Tokens per window, one test for each.
        num_slots: Sizes of the dictionary to test, see `dictionaries_to_test`.
        merges: Merge rules to test, likewise.
        num_windows: Largest number of windows per length.
        piece_size: Tokens read at a time, which limits the memory needed.
        bytes_of_tokens: `[V]` bytes of text that each token stands for, see `token_bytes`.
        first_token: The token before each document in training, if any.

    Returns:
        One row for each number of slots, each rule and each length, in that order.

    Raises:
        ValueError: If no document is as long as a length, a number is below 1, a document has tokens that
            the model does not know, or its logits are not those of its output layer.
    """
    if not lengths or min(block_size, piece_size) < 1:
        raise ValueError(
            "expected lengths, and a block_size and a piece_size of at least 1, "
            f"found {list(lengths)}, {block_size} and {piece_size}"
        )
    by_length = {
        length: take_windows(documents, length, num_windows, first_token=first_token) for length in lengths
    }
    tested = dictionaries_to_test(model.config, num_slots=num_slots, merges=merges)
    total = len(tested) * sum(length * len(windows) for length, windows in by_length.items())
    label = model_label(long_range_mixer(model.config), None, name)
    work, done = reporter.start(f"read {label}", total=total), 0
    rows: list[LanguageRow] = []
    for dictionary in each_dictionary(model, tested):
        check_logits(model)
        # Warm-up: compilation on first use must not count towards the speed.
        token_losses(model, by_length[min(lengths)][0][: piece_size + 1], piece_size=piece_size)
        for length in lengths:
            losses, seconds = [], 0.0
            for window in by_length[length]:
                begun = time.perf_counter()
                losses.append(token_losses(model, window, piece_size=piece_size))
                seconds += time.perf_counter() - begun
                done += length
                work.update(done, note=f"{dictionary.note}length {length}, loss {losses[-1].mean():.3f}")
            num_bytes = None
            if bytes_of_tokens is not None:
                num_bytes = sum(int(bytes_of_tokens[window[1:]].sum()) for window in by_length[length])
            rows.append(
                LanguageRow(
                    name=name,
                    **row_fields(model, dictionary, length),
                    tokens_per_second=(length - 1) * len(losses) / seconds,
                    **_summary(losses, num_bytes, block_size, chunk_size_of(model)),
                )
            )
    return rows


def _summary(
    losses: list[np.ndarray], num_bytes: int | None, block_size: int, chunk_size: int
) -> dict[str, Any]:
    """The fields of a `LanguageRow` that follow from the losses `[T - 1]` of windows."""
    wide = np.stack(losses).astype(np.float64)
    edges = np.arange(0, wide.shape[1], min(block_size, wide.shape[1]))
    sizes = np.diff([*edges, wide.shape[1]])
    blocks = np.add.reduceat(wide, edges, axis=1) / sizes
    # The first chunks are left out: the loss falls steeply there, which would look like a sawtooth.
    first = -(-min(block_size, wide.shape[1] // 2) // chunk_size) * chunk_size
    num_chunks = max(0, wide.shape[1] - first) // chunk_size
    chunks = wide[:, first : first + num_chunks * chunk_size].reshape(-1, chunk_size)
    half = chunk_size // 2
    rises = chunks[:, chunk_size - half :].mean(1) - chunks[:, :half].mean(1) if half and len(chunks) else ()
    return {
        "num_windows": len(wide),
        "loss": float(wide.mean()),
        "bits_per_byte": float(wide.sum() / np.log(2) / num_bytes) if num_bytes else None,
        "block_size": block_size,
        "window_losses": tuple(tuple(map(float, row)) for row in blocks),
        "chunk_size": chunk_size,
        "phase_losses": tuple(map(float, chunks.mean(0))) if len(chunks) else (),
        "sawtooth": float(np.mean(rises)) if len(rises) else None,
        "sawtooth_error": float(np.std(rises, ddof=1) / len(rises) ** 0.5) if len(rises) > 1 else None,
    }
