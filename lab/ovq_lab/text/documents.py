"""Documents, and the splits they belong to."""

from __future__ import annotations

import dataclasses
import hashlib

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """One complete text.

    Attributes:
        name: Unique in the corpus, and the same at every reading on every machine.
        text: The text, which can be encoded as UTF-8; never empty.
    """

    name: str
    text: str


def digest_of(text: str) -> str:
    """16 hexadecimal digits by which a text is known again, whatever its name and the corpus it is in."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def split_of(name: str, *, held_out: float = 0.1) -> str:
    """The split of a document. It depends on the name alone, not on what else the corpus holds.

    Args:
        name: Name of the document.
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
    # A file's name may have bytes that are not UTF-8.
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    # Two numbers of the digest: the first decides whether a document is held out, the second for which split.
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place >= held_out:
        return "train"
    return "test" if digest[8] % 2 else "validation"
