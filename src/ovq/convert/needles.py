"""`hidden_numbers`: texts in which single tokens of long ago matter, for a probe."""

from __future__ import annotations

from typing import Any

import numpy as np

from ovq.text.haystack import NeedleBuilder

# Of a text, for each number that is hidden in it.
_TOKENS_PER_NUMBER = 192


def hidden_numbers(
    tokenizer: Any, text: str, length: int, *, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of a text with numbers hidden among them, which are all repeated at the end.

    Args:
        tokenizer: the model's, one of transformers.
        text: where the sentences are from, beginning at a random one.
        length: most tokens. One number is hidden for every 192 of them.
        random: what numbers and places are drawn from.

    Returns:
        `[T]` token ids, and `[T]` bool, which of them belong to numbers that are repeated.

    Raises:
        ValueError: a text without sentences, or a length at which no number fits.

    Example:
        >>> from ovq.text import byte_tokenizer
        >>> found = hidden_numbers(byte_tokenizer(), "It is. So?", 200, random=np.random.default_rng(0))
        >>> print(bytes(found[0].astype("uint8")).decode()[-63:])
        One of the special magic numbers for rapid-mirror is: 5600228.
        >>> int(found[1].sum())
        8
    """
    builder = NeedleBuilder(tokenizer, haystack="essay", value="number", texts=[text])
    return builder.repeat(length, num_needles=max(1, length // _TOKENS_PER_NUMBER), random=random)
