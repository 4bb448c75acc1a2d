"""Windows of texts in which sentences (needles) are hidden and repeated at the end, which teach a small
language model to look back. `task.needle_share` of the windows of a run are of this kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ovq_lab.tasks.text import SHORTEST_NEEDLE_TEXT, TextTask
from ovq_lab.text import Corpus
from ovq_lab.text.haystack import FEWEST_CHARACTERS, NeedleBuilder, first_texts
from ovq_lab.train.config import RunConfig

# A needle and its repetition take most of these tokens if tokens are bytes.
_TOKENS_PER_NEEDLE = {"word": 144, "number": 144, "uuid": 216}

# Share of the steps with short texts only: looking back is learned on these first, and then works in longer
# ones.
_SHARE_OF_SHORT_ONES = 0.6


class NeedleWindows:
    """The windows of a run that have needles.

    A window holds as many texts as fit. In the first steps (`task.bare_needle_share` of all), a text is one
    needle without its first words, and its repetition. Then, up to 60 % of the steps, all texts have the
    shortest possible length. After that each window draws the length of its texts, between the shortest and
    its own, uniformly on a logarithmic scale. A text has one needle per 144 tokens, or per 216 if its values
    are uuids. Only the repeated values are predicted; when all tokens were predicted, a small model took
    twice as long to learn to look back.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, tokenizer: Any) -> None:
        assert isinstance(config.task, TextTask)
        self._share = config.task.needle_share
        self._num_bare_steps = round(config.task.bare_needle_share * config.train.steps)
        self._train = config.train
        texts = first_texts((tokenizer.decode(ids.tolist()) for ids in corpus), FEWEST_CHARACTERS)
        self._builders = [
            NeedleBuilder(tokenizer, haystack="essay", value=value, texts=texts)
            for value in config.task.needle_values
        ]

    def texts(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The texts of a window, by its index; none if it is a window of the corpus.

        Returns:
            For each text, `[T]` token ids, and `[T]` bool, which of them are predicted.
        """
        random = np.random.default_rng(np.random.SeedSequence(self._train.seed, spawn_key=(index,)))
        if random.random() >= self._share:
            return []
        step = index // self._train.batch_size
        window, length = self._train.length_at(step), SHORTEST_NEEDLE_TEXT
        if step < self._num_bare_steps:
            return list(self._bare_texts(window, random))
        if step >= _SHARE_OF_SHORT_ONES * self._train.steps:
            length = int(SHORTEST_NEEDLE_TEXT * (window / SHORTEST_NEEDLE_TEXT) ** random.random())
        return [self._text(length, random) for _ in range(window // length)]

    def _bare_texts(
        self, window: int, random: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        while True:
            ids, is_answer = self._builder(random).repeat_bare(random)
            window -= len(ids) + 1
            if window < 0:
                return
            yield ids, is_answer

    def _builder(self, random: np.random.Generator) -> NeedleBuilder:
        # Nothing is drawn without a choice, so runs with one kind of value keep their random numbers.
        if len(self._builders) == 1:
            return self._builders[0]
        return self._builders[int(random.integers(len(self._builders)))]

    def _text(self, length: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        builder = self._builder(random)
        num_needles = length // _TOKENS_PER_NEEDLE[builder.value]
        # The end-of-text token takes one position.
        return builder.repeat(length - 1, num_needles=num_needles, random=random)
