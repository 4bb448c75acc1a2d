"""`Sequences`: the documents of a corpus as sequences of equal length, in an order that a seed gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ovq.convert.needles import TOKENS_PER_NUMBER, hidden_numbers
from ovq.text import Corpus

# Apart from the numbers of epochs, which draw from the same seed.
_NEEDLE_STREAM = 2**32 - 1


class Sequences:
    """Sequences of `length` tokens: the documents in random order, each with the end of a text after it.

    Only what is asked for is read. Sequence i depends on the arguments and i alone. Every epoch has an order
    of its own.

    Args:
        corpus: the documents.
        length: tokens of a sequence.
        seed: seed of the order.
        needle_share: share of the sequences in which numbers are hidden, and asked for at the end.
        tokenizer: that of the corpus, one of transformers, which needles need.

    Raises:
        ValueError: a corpus of fewer tokens than a sequence, or needles without a tokenizer or room.

    Example:
        >>> from ovq.text import TextSource, load_corpus
        >>> corpus = load_corpus(TextSource(dataset="stdlib", subset="json", held_out=0), "train")
        >>> sequences = Sequences(corpus, length=64, seed=0)
        >>> sequences.batch(0, 2).shape
        torch.Size([2, 64])
    """

    def __init__(
        self, corpus: Corpus, *, length: int, seed: int, needle_share: float = 0.0, tokenizer: Any = None
    ) -> None:
        if needle_share and tokenizer is None:
            raise ValueError(f"needle_share: expected 0 without a tokenizer, found {needle_share}")
        if needle_share and length < TOKENS_PER_NUMBER:
            raise ValueError(
                f"needle_share: expected 0 with sequences of fewer than {TOKENS_PER_NUMBER} tokens, "
                f"found {needle_share} and {length}"
            )
        self._corpus, self._length, self._seed = corpus, length, seed
        self._needle_share, self._tokenizer = needle_share, tokenizer
        total = int(corpus.num_tokens.sum()) + len(corpus)
        self.num_per_epoch = total // length
        if not self.num_per_epoch:
            raise ValueError(
                f"length: expected at most {total}, all tokens of the training documents, found {length}"
            )
        self._epoch = -1

    def batch(self, index: int, size: int) -> Tensor:
        """Sequences `index * size` to `index * size + size - 1`: `[size, length]` token ids."""
        rows = [self._with_needles(i) for i in range(index * size, index * size + size)]
        return torch.from_numpy(np.stack(rows))

    def _with_needles(self, index: int) -> np.ndarray:
        """A sequence, and for a share of them its sentences with numbers hidden among them."""
        found = self._sequence(index)
        random = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(_NEEDLE_STREAM, index)))
        if random.random() >= self._needle_share:
            return found
        text = self._tokenizer.decode(found, skip_special_tokens=True)
        ids, _ = hidden_numbers(self._tokenizer, text, self._length, random=random)
        # Whole sentences leave a few tokens free.
        return np.concatenate([ids, found])[: self._length]

    def _sequence(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.num_per_epoch)
        if epoch != self._epoch:
            random = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(epoch,)))
            self._order = random.permutation(len(self._corpus))
            self._ends = (self._corpus.num_tokens[self._order] + 1).cumsum()
            # Tokens that are left over are not always the same.
            left = int(self._ends[-1]) - self.num_per_epoch * self._length
            self._first = int(random.integers(left + 1))
            self._epoch = epoch
        start = self._first + place * self._length
        found = np.empty(self._length, dtype=np.int64)
        filled = 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while filled < self._length:
            document = int(self._order[number])
            tokens = np.append(self._corpus[document], self._corpus.end_of_text)
            begin = start + filled - (int(self._ends[number]) - len(tokens))
            part = tokens[begin : begin + self._length - filled]
            found[filled : filled + len(part)] = part
            filled += len(part)
            number += 1
        return found
