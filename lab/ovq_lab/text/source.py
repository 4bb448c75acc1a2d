"""Corpus and tokenizer settings of a run's configuration."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from ovq.fields import check_at_least, check_fields
from ovq_lab.text.documents import SPLITS, Document
from ovq_lab.text.readers import find_readers, read_documents

ALL = "all"
"""Name of the split that has all documents."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """A corpus, its held-out part and its tokenizer.

    Attributes:
        dataset: A file, a folder, an installed corpus or a data set of the hub, see `read_documents`.
        text_field: The field of a row that holds the text.
        subset: Configuration of a hub data set, or one module or package of `stdlib`.
        hub_split: Split of a hub data set.
        max_documents: Read only the first documents, this many; None for all.
        held_out: Share of the documents that are not trained on, half of them for validation, half for test.
        join_to: Join consecutive documents of a split into volumes of at least this many bytes; 0: do not
            join.
        tokenizer: `"bytes"`; `"bpe:4096"` for one with that many tokens, trained on the training documents;
            the folder of a saved one; or the name of one on the hub.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> TextSource(dataset="sotu", join_to=65536).tokenizer
        'bytes'
    """

    dataset: str
    text_field: str = "text"
    subset: str | None = None
    hub_split: str = "train"
    max_documents: int | None = None
    held_out: float = 0.1
    join_to: int = 0
    tokenizer: str = "bytes"

    def __post_init__(self) -> None:
        """Check the fields that can be checked without reading anything."""
        check_fields(self)
        for name in ("dataset", "text_field", "hub_split", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a name, found none")
        check_at_least(1, self, "max_documents")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out: expected a share in [0, 1), found {self.held_out}")
        check_at_least(0, self, "join_to")
        size = self.tokenizer.removeprefix("bpe:")
        if size != self.tokenizer and (not size.isdecimal() or int(size) < 257):
            raise ValueError(
                "tokenizer: expected bpe:N with N of at least 257, the bytes and the end of a text, "
                f"found {self.tokenizer!r}"
            )

    @property
    def num_trained_tokens(self) -> int | None:
        """Vocabulary size of a tokenizer to train (`"bpe:4096"`), else None."""
        return int(self.tokenizer.removeprefix("bpe:")) if self.tokenizer.startswith("bpe:") else None


def check_split(split: str) -> None:
    """Raise ValueError unless it is the name of a split, or of all of them."""
    if split not in (*SPLITS, ALL):
        raise ValueError(f"split: expected one of {', '.join((*SPLITS, ALL))}, found {split!r}")


def source_documents(source: TextSource) -> Iterator[Document]:
    """The non-empty documents of a corpus, neither joined nor encoded."""
    documents = read_documents(
        source.dataset, text_field=source.text_field, subset=source.subset, hub_split=source.hub_split
    )
    return itertools.islice(documents, source.max_documents)


def source_content(source: TextSource) -> list[str]:
    """Strings that determine which documents a corpus has."""
    readers = find_readers(
        source.dataset, text_field=source.text_field, subset=source.subset, hub_split=source.hub_split
    )
    return [source.dataset, source.text_field, str(source.max_documents), *(r.version() for r in readers)]
