"""Needle-in-a-haystack texts: values hidden in a text and repeated at its end.

`hidden_numbers` makes the texts of the conversion probe. Needles and values are in the style of RULER (arXiv
2404.06654, section 3); the wording is ours.
"""

from __future__ import annotations

import itertools
import re
import textwrap
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

VALUES = ("word", "number", "uuid")
"""Kinds of hidden values."""

_ADJECTIVES = (
    *("amber", "brave", "brisk", "calm", "clever", "cosmic", "crimson", "curious", "daring", "dry", "dusty"),
    *("eager", "fancy", "frosty", "gentle", "golden", "hidden", "humble", "icy", "jolly", "lively", "lucky"),
    *("mellow", "misty", "noble", "orange", "patient", "quiet", "rapid", "rusty", "silent", "tidy", "vivid"),
)
_NOUNS = (
    *("anchor", "badger", "basket", "beacon", "bridge", "candle", "canyon", "castle", "comet", "falcon"),
    *("feather", "forest", "garden", "hammer", "harbor", "island", "kettle", "ladder", "lantern", "meadow"),
    *("mirror", "orchard", "otter", "pebble", "pepper", "pillow", "rabbit", "ribbon", "saddle", "tunnel"),
    *("violin", "willow"),
)

NEEDLE = "One of the special magic {kind}s for {key} is:"
"""The needle sentence, which the value follows."""

# Longer sentences are split between words, so that a needle can be placed near any depth.
_LONGEST_SENTENCE = 300
# A quarter of the number of different keys, and of different words as values.
_MOST_NEEDLES = 256
# Tokens of a text per hidden number.
_TOKENS_PER_NUMBER = 192


class HiddenValues:
    """Hides needles, sentences that give keys their values, between the sentences of a text.

    Args:
        tokenizer: The model's tokenizer, of transformers; also an attribute.
        texts: The sentences of the text in order, repeated cyclically.
        value: `"word"`, `"number"` or `"uuid"`; also an attribute.
        is_shifted: Whether each text starts at a random sentence.

    Raises:
        ValueError: If there is no sentence.
    """

    def __init__(
        self, tokenizer: Any, texts: Sequence[str], *, value: str = "number", is_shifted: bool = True
    ) -> None:
        if not texts:
            raise ValueError("texts: expected at least one sentence, found none")
        self.tokenizer = tokenizer
        self.value = value
        self._sentences = texts
        self._is_shifted = is_shifted

    def repeat(
        self, length: int, *, num_needles: int, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A text with needles at random depths, all repeated at the end in random order.

        Args:
            length: Maximum number of tokens; sentences are omitted to stay within it, all of them if needed.
            num_needles: Number of needles, with different keys and values; fewer if they do not fit, at most
                256.
            random: Source of randomness.

        Returns:
            `[T]` token ids, and `[T]` bool mask of the tokens of repeated values.

        Raises:
            ValueError: If not even one needle fits.

        Example:
            >>> from ovq.byte_tokens import byte_tokenizer
            >>> sky = ["The grass is green.", "The sky is blue.", "The sun is yellow."]
            >>> builder = HiddenValues(byte_tokenizer(), sky, value="word", is_shifted=False)
            >>> ids, is_answer = builder.repeat(320, num_needles=2, random=np.random.default_rng(0))
            >>> print(builder.tokenizer.decode(ids).replace(". ", ".\\n "))
             One of the special magic words for rapid-mirror is: dusty-badger.
             The grass is green.
             The sky is blue.
             One of the special magic words for hidden-comet is: brisk-anchor.
             The sun is yellow.
            One of the special magic words for hidden-comet is: brisk-anchor.
            One of the special magic words for rapid-mirror is: dusty-badger.
            >>> builder.tokenizer.decode(ids[is_answer])
            ' brisk-anchor dusty-badger'
        """
        pairs = self._pairs(random, min(num_needles, _MOST_NEEDLES))
        needles = [(NEEDLE.format(kind=self.value, key=key), f" {value}") for key, value in pairs]
        hidden = [self._encode(f" {words}{value}.") for words, value in needles]
        # Tokenised in parts, split before and after the value like a question and its answer.
        again = [[self._encode(part) for part in (f"\n{words}", value, ".")] for words, value in needles]
        while (room := length - sum(map(len, itertools.chain(hidden, *again)))) < 0:
            if len(hidden) == 1:
                raise ValueError(
                    f"length: expected at least {length - room} tokens for a needle, found {length}"
                )
            hidden, again = hidden[:-1], again[:-1]
        start = int(random.integers(len(self._sentences))) if self._is_shifted else 0
        parts = list(self._fill(start, room))
        for needle, place in zip(hidden, random.integers(len(parts) + 1, size=len(hidden)), strict=True):
            parts.insert(place, needle)
        size = sum(map(len, parts))
        is_answer = [np.zeros(size, dtype=bool)]
        for i in random.permutation(len(again)):
            parts += again[i]
            is_answer += [np.full(len(part), part is again[i][1]) for part in again[i]]
        return np.concatenate(parts), np.concatenate(is_answer)

    def _pairs(self, random: np.random.Generator, count: int) -> list[tuple[str, str]]:
        """Pairs of keys and values, all different."""
        words: list[str] = []
        for draw in (_word, self._draw):
            for _ in range(count):
                word = draw(random)
                while word in words:
                    word = draw(random)
                words.append(word)
        return list(zip(words[:count], words[count:], strict=True))

    def _fill(self, start: int, room: int) -> Iterator[np.ndarray]:
        """Sentences from index `start` on, as many as fit into `room` tokens."""
        for i in itertools.count(start):
            sentence = self._encode(f" {self._sentences[i % len(self._sentences)]}")
            room -= len(sentence)
            if room < 0:
                return
            yield sentence

    def _draw(self, random: np.random.Generator) -> str:
        """A random value."""
        if self.value == "word":
            return _word(random)
        if self.value == "number":
            return str(random.integers(10**6, 10**7))
        return str(uuid.UUID(bytes=random.bytes(16), version=4))

    def _encode(self, text: str, *, is_start: bool = False) -> np.ndarray:
        ids = self.tokenizer(text, add_special_tokens=is_start, verbose=False)["input_ids"]
        return np.array(ids, dtype=np.int64)


def sentences(text: str) -> list[str]:
    """The sentences of a text, each on one line; long ones are split between words.

    Example:
        >>> sentences("It was late. Very\\n late!  So it was.")
        ['It was late.', 'Very late!', 'So it was.']
    """
    lines = re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
    return [part for line in lines for part in textwrap.wrap(" ".join(line.split()), _LONGEST_SENTENCE)]


def _word(random: np.random.Generator) -> str:
    """A random key, or a value of kind `"word"`."""
    return f"{random.choice(_ADJECTIVES)}-{random.choice(_NOUNS)}"


def hidden_numbers(
    tokenizer: Any, text: str, length: int, *, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sentences of a text with numbers hidden among them, all repeated at the end.

    Args:
        tokenizer: the model's tokenizer, of transformers.
        text: source of the sentences, starting at a random one.
        length: maximum number of tokens. One number is hidden per 192 tokens.
        random: source of randomness for numbers and places.

    Returns:
        `[T]` token ids, and `[T]` bool mask of the tokens of repeated numbers.

    Raises:
        ValueError: if the text has no sentence, or no number fits into `length`.

    Example:
        >>> from ovq.byte_tokens import byte_tokenizer
        >>> found = hidden_numbers(byte_tokenizer(), "It is. So?", 200, random=np.random.default_rng(0))
        >>> print(bytes(found[0].astype("uint8")).decode()[-63:])
        One of the special magic numbers for rapid-mirror is: 5600228.
        >>> int(found[1].sum())
        8
    """
    builder = HiddenValues(tokenizer, sentences(text))
    return builder.repeat(length, num_needles=max(1, length // _TOKENS_PER_NUMBER), random=random)
