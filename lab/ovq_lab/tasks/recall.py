"""Basic in-context recall: a context of key-value pairs, then questions about some of the keys.

This is the simplest task that needs a memory beyond a window. To answer, a model must have stored the value
when it read it, under a key that means nothing outside this example, and must find it among all the others.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ovq.fields import check_at_least
from ovq_lab.tasks.base import IGNORE_INDEX, Task, TaskBatch, example_generator

FILLER = 0
"""The token between pairs where the context has room for more than its pairs."""
SEPARATOR = 1
"""The token between the context and the queries."""
NUM_SPECIAL = 2

# Distinct keys are drawn as integers, so the number of possible keys must fit into an int64.
_MAX_POSSIBLE_KEYS = 2**62


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredPairsTask(Task):
    """Keys and values in a context, and queries: what `RecallTask` and `PositionalRecallTask` share.

    An example is `context, separator, queries`. Pairs lie at random places of the context, and the remaining
    tokens are fillers. Ids: 0 is the filler, 1 the separator, then come the key tokens, and the upper half
    are value tokens.
    """

    sizes: ClassVar[tuple[str, ...]]
    """Fields that are at least 1."""

    key_length: int = 1
    query_share: float = 0.5
    pair_share: float = 1.0

    def __post_init__(self) -> None:
        """Check that an example has room for a key and a query."""
        super().__post_init__()
        check_at_least(1, self, *self.sizes)
        if not 0 < self.query_share < 1:
            raise ValueError(f"query_share: expected a number between 0 and 1, found {self.query_share}")
        if not 0 < self.pair_share <= 1:
            raise ValueError(f"pair_share: expected a number above 0 and at most 1, found {self.pair_share}")
        shortest = self.stored_length + 1 + self.query_length
        if self.length < shortest:
            raise ValueError(
                f"length: expected at least {shortest} tokens (all pairs of a key, a separator and a query), "
                f"found {self.length}"
            )

    @property
    @abstractmethod
    def pair_length(self) -> int:
        """Tokens of a key and a value."""

    @property
    @abstractmethod
    def stored_length(self) -> int:
        """Tokens of all pairs of one key."""

    @property
    @abstractmethod
    def query_length(self) -> int:
        """Tokens of a query."""

    @property
    def num_queries(self) -> int:
        """Queries per example."""
        wanted = max(1, int(self.query_share * self.length) // self.query_length)
        return min(wanted, (self.length - 1 - self.stored_length) // self.query_length)

    @property
    def context_length(self) -> int:
        """Tokens before the separator."""
        return self.length - 1 - self.num_queries * self.query_length

    @property
    def num_key_tokens(self) -> int:
        """Number of ids that key tokens are drawn from; the first of them is `NUM_SPECIAL`."""
        return (self.vocab_size - NUM_SPECIAL) // 2

    @property
    def first_value_token(self) -> int:
        """The lowest id of a value token; all ids from here on are value tokens."""
        return NUM_SPECIAL + self.num_key_tokens

    @property
    def keys_in_context(self) -> int:
        """Keys that `pair_share` allows, but at least one."""
        return max(1, int(self.context_length * self.pair_share) // self.stored_length)

    @property
    def query_positions(self) -> np.ndarray:
        """`[Q]` the first token of each query."""
        return self.context_length + 1 + np.arange(self.num_queries) * self.query_length

    def askings(self, labels: np.ndarray, num_keys: int) -> dict[str, np.ndarray]:
        """The slices of the first round of questions, for each of `num_keys` keys once, and of later rounds.

        Of the latter, the input holds the answer again, in an earlier question.
        """
        first, later = labels != IGNORE_INDEX, labels != IGNORE_INDEX
        end = self.context_length + 1 + num_keys * self.query_length
        first[:, end:], later[:, :end] = False, False
        return {"asking first": first, "asking later": later}

    def tokens_of(
        self, pairs: np.ndarray, starts: np.ndarray, queries: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels `[B, T]` from pairs `[B, P, pair_length]`, which begin at `starts` `[B, P]`, and
        queries `[B, Q, query_length]`."""
        inputs = np.full((len(pairs), self.length), FILLER, dtype=np.int64)
        rows = np.arange(len(pairs))[:, None, None]
        inputs[rows, starts[..., None] + np.arange(self.pair_length)] = pairs
        inputs[:, self.context_length] = SEPARATOR
        first = self.context_length + 1
        inputs[:, first:] = queries.reshape(len(queries), self.length - first)
        labels = np.full_like(inputs, IGNORE_INDEX)
        is_value = np.arange(self.length - first) % self.query_length >= self.key_length
        labels[:, first:][:, is_value] = inputs[:, first:][:, is_value]
        return inputs, labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallTask(StoredPairsTask):
    """In-context recall of random values stored under random distinct keys.

    An example is `context, separator, queries`. The context holds `num_pairs` pairs, each of `key_length` key
    tokens and then `value_length` value tokens. They lie at random places in a random order, and the
    remaining tokens are fillers. A query repeats a pair, and the model has to predict the value. No key is
    asked a second time before every key was asked once. In the recipe four of five questions are such later
    askings, whose answers stand in earlier questions: the accuracy is mostly theirs. Ids: 0 is the filler, 1
    the separator, then come the key tokens, and the upper half are value tokens.

    Attributes:
        length: Tokens per example, T.
        vocab_size: Number of token ids; about one half each are keys and values.
        key_length: Tokens per key.
        value_length: Tokens per value.
        query_share: Share of an example's tokens that the queries take, between 0 and 1.
        pair_share: Share of the context's tokens that belong to pairs, above 0 and at most 1; the rest are
            fillers. Longer examples therefore have more to remember.
        num_pairs: Pairs in the context, the same number at every length; takes the place of `pair_share`.

    Raises:
        ValueError: If a field is out of range, or pairs, queries and keys do not fit; says what was expected
            and found.

    Example:
        Three pairs of two-token keys and one-token values, with three fillers at random places among them,
        and two queries. Key tokens are 2 to 8, value tokens 9 to 15. Below, tokens 2-4, 5-7 and 8-10 are the
        pairs (2 2: 12), (8 5: 9) and (4 8: 14); token 12 is the separator; the first two pairs are asked for:

        >>> task = RecallTask(length=19, vocab_size=16, key_length=2, num_pairs=3, query_share=0.35)
        >>> inputs, labels, slices = task.build(0)
        >>> print(*inputs[0])
        0 0 2 2 12 8 5 9 4 8 14 0 1 2 2 12 8 5 9
        >>> print(*(label if label != -100 else "." for label in labels[0]))
        . . . . . . . . . . . . . . . 12 . . 9

        The slices group the asked tokens by whether an earlier question has repeated the pair, and by how
        many tokens lie between the query and the pair of the context:

        >>> {name: int(mask.sum()) for name, mask in slices.items()}
        {'asking first': 2, 'asking later': 0, 'distance 4-7': 0, 'distance 8-15': 2, 'distance 16-31': 0}
    """

    name: ClassVar[str] = "recall"
    sizes: ClassVar[tuple[str, ...]] = ("key_length", "value_length")
    value_length: int = 1
    num_pairs: int | None = None

    def __post_init__(self) -> None:
        """Check every field, dependent ones last."""
        super().__post_init__()
        check_at_least(NUM_SPECIAL + 2, self, "vocab_size")
        check_at_least(1, self, "num_pairs")
        if self.num_pairs is not None and self.pair_share != 1:
            raise ValueError(
                "num_pairs and pair_share: expected one of the two, "
                f"found num_pairs {self.num_pairs} and pair_share {self.pair_share}"
            )
        most_pairs = self.context_length // self.pair_length
        if self.num_stored > most_pairs:
            raise ValueError(
                f"num_pairs: expected at most {most_pairs}, what {self.context_length} context tokens hold "
                f"(length {self.length}, query_share {self.query_share}), found {self.num_stored}"
            )
        check_possible_keys(self.num_key_tokens, self.key_length, at_least=self.num_stored)

    @property
    def pair_length(self) -> int:
        """Tokens of a key and its value."""
        return self.key_length + self.value_length

    # A key is stored once, and a query repeats its pair.
    stored_length = query_length = pair_length

    @property
    def num_stored(self) -> int:
        """Pairs per example: `num_pairs`, or as many as `pair_share` allows, but at least one."""
        return self.keys_in_context if self.num_pairs is None else self.num_pairs

    def build(self, seed: int, *, indices: Sequence[int] = (0,), split: str = "train") -> TaskBatch:
        """Build the examples with these indices; see `Task.build` and the example of the class."""
        pairs, starts, asked = self._draw(seed, indices, split)
        rows = np.arange(len(indices))[:, None]
        inputs, labels = self.tokens_of(pairs, starts, queries=pairs[rows, asked])
        distances = self.query_positions - starts[rows, asked]
        # The shortest distance is from the first query to the last pair, with the separator between.
        slices = self.askings(labels, self.num_stored) | distance_masks(
            np.repeat(distances, self.value_length, axis=1),
            labels != IGNORE_INDEX,
            smallest=self.pair_length + 1,
        )
        return TaskBatch(inputs, labels, slices)

    def pair_places(
        self, seed: int, *, indices: Sequence[int] = (0,), split: str = "train"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the pairs in the examples of `build`: pairs of the context, then of the queries.

        Returns:
            `[B, num_stored + num_queries]` positions of their first tokens, and the numbers of the pairs, in
            the order of the context.

        Example:
            >>> task = RecallTask(length=19, vocab_size=16, key_length=2, num_pairs=3, query_share=0.35)
            >>> starts, pairs = task.pair_places(0)
            >>> starts.tolist(), pairs.tolist()
            ([[2, 5, 8, 13, 16]], [[0, 1, 2, 0, 1]])
        """
        _, starts, asked = self._draw(seed, indices, split)
        first = [starts, np.broadcast_to(self.query_positions, asked.shape)]
        stored = np.broadcast_to(np.arange(self.num_stored), starts.shape)
        return np.concatenate(first, 1), np.concatenate([stored, asked], 1)

    def _draw(
        self, seed: int, indices: Sequence[int], split: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw pairs `[B, P, pair_length]`, their starts `[B, P]` and the pairs to ask for `[B, Q]`."""
        num_stored, num_queries = self.num_stored, self.num_queries
        num_free = self.context_length - num_stored * self.pair_length
        key_ids = np.empty((len(indices), num_stored), dtype=np.int64)
        values = np.empty((len(indices), num_stored, self.value_length), dtype=np.int64)
        places = np.empty((len(indices), num_stored), dtype=np.int64)
        asked = np.empty((len(indices), num_queries), dtype=np.int64)
        for row, index in enumerate(indices):
            rng = example_generator(seed, index, split=split)
            key_ids[row] = rng.choice(self.num_key_tokens**self.key_length, num_stored, replace=False)
            values[row] = rng.integers(self.first_value_token, self.vocab_size, values.shape[1:])
            places[row] = rng.choice(num_stored + num_free, num_stored, replace=False, shuffle=False)
            rounds = [rng.permutation(num_stored) for _ in range(-(-num_queries // num_stored))]
            asked[row] = np.concatenate(rounds)[:num_queries]

        keys = spell_keys(key_ids, self.num_key_tokens, self.key_length)
        # `places` counts a pair as one place; the further tokens of earlier pairs are added here.
        starts = np.sort(places, axis=1) + np.arange(num_stored) * (self.pair_length - 1)
        return np.concatenate([keys, values], axis=2), starts, asked


def check_possible_keys(num_key_tokens: int, key_length: int, *, at_least: int) -> None:
    """Check that the sizes allow enough different keys, and no more than an int64 can count."""
    if not at_least <= num_key_tokens**key_length <= _MAX_POSSIBLE_KEYS:
        raise ValueError(
            f"vocab_size and key_length: expected between {at_least} (the keys of an example) "
            f"and 2**62 different keys, found {num_key_tokens}**{key_length}"
        )


def spell_keys(key_ids: np.ndarray, num_key_tokens: int, key_length: int) -> np.ndarray:
    """Key numbers `[...]` as tokens `[..., key_length]`; different numbers give different keys.

    Example:
        >>> spell_keys(np.array([0, 1, 7]), 7, 2).tolist()
        [[2, 2], [3, 2], [2, 3]]
    """
    # A key is its number written in base num_key_tokens.
    return NUM_SPECIAL + key_ids[..., None] // num_key_tokens ** np.arange(key_length) % num_key_tokens


def distance_masks(distances: np.ndarray, is_labelled: np.ndarray, *, smallest: int) -> dict[str, np.ndarray]:
    """Slices of the labelled tokens by octaves of a distance.

    Args:
        distances: `[B, A]` positive, one for each labelled token of a row, in order.
        is_labelled: `[B, T]` bool, A of them true in each row.
        smallest: The smallest possible distance; the largest is T - 1. The names follow from these two
            bounds, so they do not depend on the examples.

    Returns:
        Name -> `[B, T]` bool.

    Example:
        >>> masks = distance_masks(np.array([[5, 3]]), np.array([[0, 0, 1, 1, 0, 0]], dtype=bool), smallest=2)
        >>> {name: mask[0].nonzero()[0].tolist() for name, mask in masks.items()}
        {'distance 2-3': [3], 'distance 4-7': [2]}
    """
    octaves = np.frexp(distances)[1] - 1
    masks = {}
    for octave in range(smallest.bit_length() - 1, (is_labelled.shape[1] - 1).bit_length()):
        mask = np.zeros_like(is_labelled)
        mask[is_labelled] = (octaves == octave).reshape(-1)
        masks[f"distance {2**octave}-{2 ** (octave + 1) - 1}"] = mask
    return masks
