"""Documents as token arrays: encoded once, stored in the user's cache, and memory-mapped from there.

All documents of a corpus are stored once for all splits and volumes, in a folder that appears only when
complete:

    ~/.cache/ovq/text/DIGEST/tokens.bin    the tokens of all documents, one after the other
    ~/.cache/ovq/text/DIGEST/index.json    names, digests, numbers of tokens and of bytes of the documents;
                                           type and SHA-256 of the tokens
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ovq.runtime.files import read_json
from ovq.runtime.progress import AnyReporter
from ovq_lab.text.cache import cached_folder
from ovq_lab.text.documents import SPLITS, Document, digest_of, split_of
from ovq_lab.text.source import ALL, TextSource, check_split, source_content, source_documents
from ovq_lab.text.tokenizers import (
    encode_bytes,
    is_byte_tokenizer,
    num_token_ids,
    source_tokenizer,
    tokenizer_content,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS_FILE, _INDEX_FILE = "tokens.bin", "index.json"
_SEPARATOR = "\n\n"
"""Separates the documents of a volume."""
_DOCUMENTS_PER_CALL = 32
"""Documents passed to a tokenizer at once, which encodes them in threads."""
_SECONDS_BETWEEN_LINES = 10.0


class Corpus:
    """The documents of a split, or volumes of them: a sequence of token arrays.

    Attributes:
        names: Names of the documents; a volume has the names of its first and its last document.
        num_tokens: `[D]` int64, tokens of each, without the end-of-text token.
        num_bytes: `[D]` int64, bytes of each in UTF-8.
        end_of_text: The end-of-text token; the arrays do not contain it.
        digest: Digest of all names and tokens; different corpora have different digests.
        digests: Those of the texts of all documents, also of the ones that are joined to volumes.
        num_in_splits: Number of documents of each split of the source, of this one and of the others.

    Example:
        >>> source = TextSource(dataset="stdlib", subset="json", held_out=0)
        >>> corpus = load_corpus(source, "train")
        >>> corpus.names[1], bytes(corpus[1][:16]), corpus.end_of_text
        ('stdlib/json/decoder.py', b'\"\"\"Implementatio', 256)
        >>> len(corpus[1]) == int(corpus.num_tokens[1]) == int(corpus.num_bytes[1])
        True
    """

    def __init__(
        self,
        stored: _Stored,
        groups: list[list[int]],
        *,
        separator: np.ndarray,
        end_of_text: int,
        num_in_splits: dict[str, int],
    ) -> None:
        self._stored = stored
        self._groups = groups
        self._separator = separator.astype(stored.tokens.dtype)
        self.end_of_text = end_of_text
        ends = ((stored.names[group[0]], stored.names[group[-1]]) for group in groups)
        self.names = [first if first == last else f"{first}..{last}" for first, last in ends]
        between = np.array([len(group) - 1 for group in groups], dtype=np.int64)
        self.num_tokens = _sums(stored.num_tokens, groups) + between * len(separator)
        self.num_bytes = _sums(stored.num_bytes, groups) + between * len(_SEPARATOR)
        content = json.dumps([stored.sha256, stored.names, groups, separator.tolist(), end_of_text])
        self.digest = hashlib.sha256(content.encode()).hexdigest()
        self.digests = [stored.digests[i] for group in groups for i in group]
        self.num_in_splits = num_in_splits

    def __len__(self) -> int:
        """Number of documents, or of volumes."""
        return len(self._groups)

    def __getitem__(self, index: int) -> np.ndarray:
        """Tokens of a document, `[T]` of an unsigned type: read-only, and loaded from disk only when used."""
        return self.tokens(index, 0, int(self.num_tokens[index]))

    def tokens(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop - 1` of a document: `self[index][start:stop]` without copying the rest."""
        group = self._groups[index]
        if len(group) == 1:
            return self._stored.document(group[0])[start:stop]
        stop = min(stop, int(self.num_tokens[index]))
        ends = (self._stored.num_tokens[group] + len(self._separator)).cumsum()
        parts = [self._separator[:0]]
        first, last = np.searchsorted(ends, [start + 1, stop])
        for place in range(first, last + 1):
            document = self._stored.document(group[place])
            begin = int(ends[place]) - len(self._separator) - len(document)
            for part in (document, self._separator):
                parts.append(part[max(0, start - begin) : max(0, stop - begin)])
                begin += len(part)
        return np.concatenate(parts)

    def __iter__(self) -> Iterator[np.ndarray]:
        """All documents, in order."""
        return (self[i] for i in range(len(self)))


def load_corpus(
    source: TextSource,
    split: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int], None] | None = None,
) -> Corpus:
    """Load the documents of a split as tokens, from the cache if they have been read before.

    Volumes join consecutive documents of one split only, so no part of a test document is ever trained on,
    whatever `join_to` is.

    Args:
        source: The corpus.
        split: `"train"`, `"validation"`, `"test"` or `"all"`.
        tokenizer: Used instead of the source's, for example the one saved beside a model.
        progress: Called with the number of documents read so far, if they are not cached.

    Raises:
        ValueError: If the corpus cannot be read, two documents share a name, or the split is empty.
    """
    check_split(split)
    tokenizer = source_tokenizer(source) if tokenizer is None else tokenizer
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: expected one with a token for the end of a text, found none")
    encode = _encoder(tokenizer)
    stored = _Stored.load(
        cached_folder(
            [*source_content(source), tokenizer_content(tokenizer)],
            lambda folder: _store(folder, source_documents(source), encode, tokenizer, progress),
        )
    )
    splits = [split_of(name, held_out=source.held_out) for name in stored.names]
    chosen = [i for i, found in enumerate(splits) if split in (ALL, found)]
    if not chosen:
        raise ValueError(
            f"dataset: expected documents for {split} in {source.dataset!r}, found none among its "
            f"{len(stored.names)} (held_out={source.held_out}); train on more documents, or with another "
            "task.held_out"
        )
    groups = _volumes(chosen, stored.num_bytes, source.join_to)
    (separator,) = encode([_SEPARATOR])
    return Corpus(
        stored,
        groups,
        separator=separator,
        end_of_text=tokenizer.eos_token_id,
        num_in_splits={name: splits.count(name) for name in SPLITS},
    )


def say_progress(name: str, reporter: AnyReporter) -> Callable[[int], None]:
    """A callback that reports every few seconds the number of documents read; the total is not known yet."""
    last_line = time.monotonic()

    def progress(num_documents: int) -> None:
        nonlocal last_line
        if time.monotonic() - last_line >= _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            reporter.say(f"read {name}: {num_documents} documents")

    return progress


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _Stored:
    """A corpus in the cache: all documents, in order."""

    tokens: np.ndarray
    names: list[str]
    digests: list[str]
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    ends: np.ndarray
    sha256: str

    @classmethod
    def load(cls, folder: Path) -> _Stored:
        """Memory-map the tokens of a folder and read the rest."""
        try:
            index = read_json(folder / _INDEX_FILE)
            num_tokens = np.array(index["num_tokens"], dtype=np.int64)
            stored = cls(
                tokens=np.memmap(folder / _TOKENS_FILE, dtype=index["dtype"], mode="r"),
                names=index["names"],
                digests=index["digests"],
                num_tokens=num_tokens,
                num_bytes=np.array(index["num_bytes"], dtype=np.int64),
                ends=num_tokens.cumsum(),
                sha256=index["sha256"],
            )
            if len(stored.tokens) != num_tokens.sum():
                raise ValueError(f"expected {num_tokens.sum()} tokens, found {len(stored.tokens)}")
            return stored
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}: expected a cached corpus, found a damaged one ({error}); "
                "delete the folder to create it again"
            ) from error

    def document(self, i: int) -> np.ndarray:
        return self.tokens[self.ends[i] - self.num_tokens[i] : self.ends[i]]


def _store(
    folder: Path,
    documents: Iterable[Document],
    encode: Callable[[list[str]], list[np.ndarray]],
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int], None] | None,
) -> None:
    """Encode documents into an empty folder."""
    # The end-of-text token is never stored, so that bytes fit into uint8.
    largest = num_token_ids(tokenizer) - 1
    dtype = np.min_scalar_type(largest - (tokenizer.eos_token_id == largest))
    names, digests, num_tokens, num_bytes, content = [], [], [], [], hashlib.sha256()
    with open(folder / _TOKENS_FILE, "wb") as file:
        remaining = iter(documents)
        while batch := list(itertools.islice(remaining, _DOCUMENTS_PER_CALL)):
            for document, tokens in zip(batch, encode([d.text for d in batch]), strict=True):
                raw = tokens.astype(dtype).tobytes()
                file.write(raw)
                content.update(raw)
                names.append(document.name)
                digests.append(digest_of(document.text))
                num_tokens.append(len(tokens))
                num_bytes.append(len(document.text.encode("utf-8")))
            if progress is not None:
                progress(len(names))
    _check_names(names)
    index = {"names": names, "digests": digests, "num_tokens": num_tokens, "num_bytes": num_bytes}
    index |= {"dtype": dtype.name, "sha256": content.hexdigest()}
    (folder / _INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def _check_names(names: list[str]) -> None:
    """Raise ValueError if two documents share a name: they could not be split reliably."""
    if not names:
        raise ValueError("dataset: expected at least one document that is not empty, found none")
    if len(set(names)) < len(names):
        twice = next(name for name, num in collections.Counter(names).items() if num > 1)
        raise ValueError(f"dataset: expected unique names of documents, found {twice!r} twice")


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[np.ndarray]]:
    """A function that turns texts into tokens."""
    if is_byte_tokenizer(tokenizer):
        return lambda texts: [encode_bytes(text) for text in texts]

    def encode(texts: list[str]) -> list[np.ndarray]:
        # Not verbose: tokenizers warn about documents longer than their model's maximum length.
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.array(ids, dtype=np.uint32) for ids in encoded]

    return encode


def _volumes(chosen: list[int], num_bytes: np.ndarray, join_to: int) -> list[list[int]]:
    """Groups of consecutive documents with at least `join_to` bytes each; a short rest joins the last group.

    Example:
        >>> _volumes([0, 1, 2, 4], np.array([3, 3, 9, 9, 1]), 5)
        [[0, 1], [2, 4]]
    """
    groups: list[list[int]] = []
    size = 0
    for i in chosen:
        if size >= join_to or not groups:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += int(num_bytes[i])
    if len(groups) > 1 and size < join_to:
        short = groups.pop()
        groups[-1] += short
    return groups


def _sums(values: np.ndarray, groups: list[list[int]]) -> np.ndarray:
    return np.array([values[group].sum() for group in groups], dtype=np.int64)
