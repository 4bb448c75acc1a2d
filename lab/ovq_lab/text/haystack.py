"""Needles in haystacks, in the style of RULER: one sentence hidden in a long text, and a question about it.

The sentence assigns a value (a word, a number or a uuid) to a key. The text around it is five sentences,
repeated ("noise"), or text by human authors ("essay"). The question ends with the needle's own words up to
the value [ours; RULER's ends with other words], so that a model that can only continue text can answer it.
The kinds of text, needles and values are those of RULER (arXiv 2404.06654, section 3). The wording is ours,
except for the noise, which goes back to arXiv 2305.16300.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from ovq.hidden_values import NEEDLE, VALUES, HiddenValues, sentences
from ovq_lab.text.documents import split_of
from ovq_lab.text.source import ALL, TextSource, check_split, source_documents

HAYSTACKS = ("noise", "essay")

_NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_INTRODUCTION = "A special magic {kind} is hidden within the following text. Keep it in mind.\n"
# A needle without its first words.
_BARE = "{key} is:"
_QUESTION = "\nWhat is the special magic {kind} for {key} in the text above?"

_CANDIDATES_PER_DISTRACTOR = 16
# Smallest number of characters of the texts that essays are cut from: several times an essay, as each essay
# begins at another place. More is not read.
FEWEST_CHARACTERS = 2**22
_CHARACTERS_PER_TOKEN = 64


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Needle:
    """One question.

    Attributes:
        prompt: `[T]` token ids of the text and the question.
        answer: `[A]` token ids of the value, the right continuation.
        distractors: Token ids of other values from the same distribution; they do not occur in the text, and
            have as many tokens if possible.
    """

    prompt: np.ndarray
    answer: np.ndarray
    value: str
    distractors: tuple[np.ndarray, ...]


class NeedleBuilder(HiddenValues):
    """Builds questions of any length and depth for one tokenizer.

    Args:
        tokenizer: The model's, one of transformers; these four arguments are attributes too.
        haystack: `"noise"` or `"essay"`.
        value: `"word"`, `"number"` or `"uuid"`.
        num_distractors: Number of other values per question.
        texts: Texts that essays are cut from. Each question begins at another sentence; the texts are
            repeated cyclically.

    Example:
        >>> import re
        >>> from ovq_lab.text import byte_tokenizer
        >>> tokenizer = byte_tokenizer()
        >>> needle = NeedleBuilder(tokenizer, value="number").build(320, depth=0.5, seed=0, index=0)
        >>> print(re.sub("[.?] ", ".\\n", tokenizer.decode(needle.prompt)), tokenizer.decode(needle.answer))
        A special magic number is hidden within the following text.
        Keep it in mind.
         The grass is green.
        One of the special magic numbers for patient-violin is: 1049347.
        The sky is blue.
        What is the special magic number for patient-violin in the text above.
        One of the special magic numbers for patient-violin is:  1049347
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        haystack: str = "noise",
        value: str = "number",
        num_distractors: int = 7,
        texts: Iterable[str] = (),
    ) -> None:
        for name, found, allowed in (("haystack", haystack, HAYSTACKS), ("value", value, VALUES)):
            if found not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {found!r}")
        if num_distractors < 1:
            raise ValueError(f"num_distractors: expected at least 1, found {num_distractors}")
        hay = list(_NOISE) if haystack == "noise" else [s for text in texts for s in sentences(text)]
        # Noise always begins with its first sentence.
        super().__init__(tokenizer, hay, value=value, is_shifted=haystack == "essay")
        self.haystack = haystack
        self.num_distractors = num_distractors

    def build(self, length: int, *, depth: float, seed: int, index: int) -> Needle:
        """Build a question; its key, value and text depend only on `seed` and `index`.

        Args:
            length: Largest number of tokens of prompt and answer together; sentences are left out to stay
                within it.
            depth: Relative position of the needle, from 0 (the beginning) to 1 (right before the question).
        """
        if not 0 <= depth <= 1:
            raise ValueError(f"depth: expected a number from 0 to 1, found {depth}")
        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
        [(key, value)] = self._pairs(random, 1)
        start = int(random.integers(len(self._sentences))) if self._is_shifted else 0
        words = {"kind": self.value, "key": key}
        needle = NEEDLE.format(**words)
        introduction = self._encode(_INTRODUCTION.format(**words), is_start=True)
        hidden = self._encode(f" {needle} {value}.")
        question = self._encode(f"{_QUESTION.format(**words)} {needle}")
        answer = self._encode(f" {value}")
        room = length - sum(map(len, (introduction, hidden, question, answer)))
        # An essay begins with the first sentence from `start` on that fits.
        starts = range(start, start + len(self._sentences)) if room > 0 else ()
        hay = next((found for place in starts if (found := list(self._fill(place, room)))), [])
        if not hay:
            raise ValueError(
                f"length: expected room for a sentence beside the {length - room} tokens of needle and "
                f"question, found {length}"
            )
        ends = np.cumsum([len(sentence) for sentence in hay])
        place = int(np.argmin(np.abs(np.array([0, *ends]) - depth * ends[-1])))
        parts = [introduction, *hay[:place], hidden, *hay[place:], question]
        return Needle(
            prompt=np.concatenate(parts),
            answer=answer,
            value=value,
            distractors=self._distractors(random, value, len(answer)),
        )

    def repeat_bare(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The shortest text to learn copying from: a needle without the words before its key, twice; returned
        as by `repeat`.
        """
        [(key, value)] = self._pairs(random, 1)
        words = _BARE.format(key=key)
        texts = (f" {words} {value}.", f"\n{words}", f" {value}", ".")
        parts = [self._encode(text) for text in texts]
        is_answer = [np.full(len(part), i == 2) for i, part in enumerate(parts)]
        return np.concatenate(parts), np.concatenate(is_answer)

    def _distractors(
        self, random: np.random.Generator, value: str, num_tokens: int
    ) -> tuple[np.ndarray, ...]:
        """Other values, preferably with as many tokens as the right one."""
        drawn = (self._draw(random) for _ in range(self.num_distractors * _CANDIDATES_PER_DISTRACTOR))
        others = [self._encode(f" {other}") for other in dict.fromkeys(drawn) if other != value]
        if len(others) < self.num_distractors:
            raise ValueError(
                f"num_distractors: expected at most {len(others)}, as no more {self.value}s were found, "
                f"found {self.num_distractors}"
            )
        others.sort(key=lambda ids: abs(len(ids) - num_tokens))
        return tuple(others[: self.num_distractors])


def essay_texts(source: TextSource, split: str, length: int) -> list[str]:
    """The first documents of a split, as many as essays of `length` tokens need."""
    check_split(split)
    of_split = (
        document.text
        for document in source_documents(source)
        if split in (ALL, split_of(document.name, held_out=source.held_out))
    )
    texts = first_texts(of_split, max(_CHARACTERS_PER_TOKEN * length, FEWEST_CHARACTERS))
    if not texts:
        raise ValueError(f"dataset: expected documents for {split} in {source.dataset!r}, found none")
    return texts


def first_texts(texts: Iterable[str], num_characters: int) -> list[str]:
    """The first texts, as many as have `num_characters` together."""
    found: list[str] = []
    for text in texts:
        found.append(text)
        num_characters -= len(text)
        if num_characters <= 0:
            break
    return found
