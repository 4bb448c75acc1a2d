"""Positional in-context recall: a key occurs several times, and its values are asked for in order.

Recall by content alone finds the values of a key, but not their order. One long-range layer can mark each
pair with the number of earlier occurrences of its key; a second layer can then look up the key together with
that number. A model therefore needs two such layers, and a memory that keeps the occurrences of a key apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ovq_lab.tasks.base import IGNORE_INDEX, TaskBatch, example_generator
from ovq_lab.tasks.recall import (
    NUM_SPECIAL,
    StoredPairsTask,
    check_possible_keys,
    distance_masks,
    spell_keys,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PositionalRecallTask(StoredPairsTask):
    """In-context recall of all values of a key, in the order in which they were stored.

    An example is `context, separator, queries`. The context holds `num_keys` keys, each `num_occurrences`
    times, each time with another value of one token. The pairs lie at random places in a random order, and
    the remaining tokens are fillers. A query is a key, once, followed by its values in order of appearance,
    which the model has to predict. No key is asked a second time before every key was asked once; in the
    recipe seven of eight questions are such later askings. Ids: 0 is the filler, 1 the separator, then come
    the key tokens, and the upper half are value tokens. The paper's own layout and sizes are not public;
    these are [ours].

    Attributes:
        length: Tokens per example, T.
        vocab_size: Number of token ids; about one half each are keys and values.
        key_length: Tokens per key.
        num_occurrences: Pairs in which each key occurs.
        query_share: Share of an example's tokens that the queries take, between 0 and 1.
        pair_share: Share of the context's tokens that belong to pairs, above 0 and at most 1; the rest are
            fillers. Longer examples therefore have more to remember.

    Raises:
        ValueError: If a field is out of range, or pairs, queries and keys do not fit; says what was expected
            and found.

    Example:
        Two keys of one token, each stored twice, three fillers, and one query. Key tokens are 2 to 8, value
        tokens 9 to 15. Key 2 is stored with 15 first and then with 11, key 5 with 15 and then with 9:

        >>> task = PositionalRecallTask(length=15, vocab_size=16, query_share=0.3, pair_share=0.8)
        >>> inputs, labels, slices = task.build(0)
        >>> print(*inputs[0])
        0 0 0 2 15 5 15 5 9 2 11 1 2 15 11
        >>> print(*(label if label != -100 else "." for label in labels[0]))
        . . . . . . . . . . . . . 15 11

        The slices group the asked tokens by which occurrence of the key they ask for, by whether an earlier
        question has repeated it, and by how many tokens lie between the query and the pair of the context:

        >>> {name: int(mask.sum()) for name, mask in slices.items() if mask.any()}
        {'occurrence 1': 1, 'occurrence 2': 1, 'asking first': 2, 'distance 2-3': 1, 'distance 8-15': 1}
    """

    name: ClassVar[str] = "positional"
    sizes: ClassVar[tuple[str, ...]] = ("key_length", "num_occurrences")
    num_occurrences: int = 2

    def __post_init__(self) -> None:
        """Check every field, dependent ones last."""
        super().__post_init__()
        if self.vocab_size - self.first_value_token < self.num_occurrences:
            raise ValueError(
                f"vocab_size: expected at least {NUM_SPECIAL + 2 * self.num_occurrences} "
                f"({self.num_occurrences} different values a key), found {self.vocab_size}"
            )
        check_possible_keys(self.num_key_tokens, self.key_length, at_least=self.num_keys)

    @property
    def pair_length(self) -> int:
        """Tokens of a key and one value."""
        return self.key_length + 1

    @property
    def stored_length(self) -> int:
        """Tokens of all pairs of one key."""
        return self.num_occurrences * self.pair_length

    @property
    def query_length(self) -> int:
        """Tokens of a query: a key and all its values."""
        return self.key_length + self.num_occurrences

    @property
    def num_keys(self) -> int:
        """Keys per example: as many as `pair_share` allows, but at least one."""
        return self.keys_in_context

    def build(self, seed: int, *, indices: Sequence[int] = (0,), split: str = "train") -> TaskBatch:
        """Build the examples with these indices; see `Task.build` and the example of the class."""
        keys, values, starts, asked = self._draw(seed, indices, split)
        rows = np.arange(len(indices))[:, None]
        num_pairs = self.num_keys * self.num_occurrences
        # `[B, number of keys, occurrences, pair_length]`
        pairs = np.concatenate(
            [np.repeat(keys[:, :, None], self.num_occurrences, axis=2), values[..., None]], axis=3
        )
        inputs, labels = self.tokens_of(
            pairs.reshape(len(indices), num_pairs, self.pair_length),
            starts.reshape(len(indices), num_pairs),
            queries=np.concatenate([keys[rows, asked], values[rows, asked]], axis=2),
        )
        slices = {}
        for occurrence in range(self.num_occurrences):
            mask = np.zeros(inputs.shape, dtype=bool)
            mask[:, self.query_positions + self.key_length + occurrence] = True
            slices[f"occurrence {occurrence + 1}"] = mask
        distances = self.query_positions[:, None] - starts[rows, asked]
        slices |= self.askings(labels, self.num_keys) | distance_masks(
            distances.reshape(len(indices), self.num_queries * self.num_occurrences),
            labels != IGNORE_INDEX,
            smallest=self.pair_length + 1,
        )
        return TaskBatch(inputs, labels, slices)

    def _draw(
        self, seed: int, indices: Sequence[int], split: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draw the keys `[B, P, key_length]`, the values and the starts of their pairs
        `[B, P, num_occurrences]` (starts in rising order), and the keys to ask for `[B, Q]`."""
        num_keys, num_queries, num_values = (
            self.num_keys,
            self.num_queries,
            self.vocab_size - self.first_value_token,
        )
        num_pairs = num_keys * self.num_occurrences
        num_free = self.context_length - num_pairs * self.pair_length
        key_ids = np.empty((len(indices), num_keys), dtype=np.int64)
        values = np.empty((len(indices), num_keys, self.num_occurrences), dtype=np.int64)
        places = np.empty((len(indices), num_pairs), dtype=np.int64)
        owners = np.empty_like(places)
        asked = np.empty((len(indices), num_queries), dtype=np.int64)
        for row, index in enumerate(indices):
            rng = example_generator(seed, index, split=split)
            key_ids[row] = rng.choice(self.num_key_tokens**self.key_length, num_keys, replace=False)
            values[row] = _distinct(rng, num_keys, self.num_occurrences, num_values)
            places[row] = rng.choice(num_pairs + num_free, num_pairs, replace=False, shuffle=False)
            owners[row] = rng.permutation(num_pairs) % num_keys
            rounds = [rng.permutation(num_keys) for _ in range(-(-num_queries // num_keys))]
            asked[row] = np.concatenate(rounds)[:num_queries]

        # `places` counts a pair as one place; the further tokens of earlier pairs are added here.
        starts = np.sort(places, axis=1) + np.arange(num_pairs) * (self.pair_length - 1)
        # Group the pairs by key; the sort is stable, so the pairs of a key stay in order.
        order = np.argsort(owners, axis=1, kind="stable")
        starts = np.take_along_axis(starts, order, axis=1).reshape(values.shape)
        keys = spell_keys(key_ids, self.num_key_tokens, self.key_length)
        return keys, values + self.first_value_token, starts, asked


def _distinct(rng: np.random.Generator, num_rows: int, size: int, bound: int) -> np.ndarray:
    """Draw `[num_rows, size]` integers below `bound`, distinct within a row, uniformly."""
    drawn = np.empty((num_rows, size), dtype=np.int64)
    for column in range(size):
        # Draw a rank among the integers left, and skip the smaller taken ones in rising order.
        new = rng.integers(bound - column, size=num_rows)
        for taken in np.sort(drawn[:, :column], axis=1).T:
            new += new >= taken
        drawn[:, column] = new
    return drawn
