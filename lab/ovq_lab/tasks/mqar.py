"""Multi-query associative recall (MQAR) as in Zoology, for comparison with published curves.

Source: Arora et al., *Zoology: Measuring and Improving Recall in Efficient Language Models* (arXiv
2312.04927), and what the generator `zoology/data/multiquery_ar.py` of github.com/HazyResearch/zoology does;
this is an independent implementation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ovq_lab.tasks.base import IGNORE_INDEX, Task, TaskBatch, example_generator
from ovq_lab.tasks.recall import distance_masks

_FIRST_KEY = 1
_TOKENS_PER_PAIR = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQARTask(Task):
    """Key-value pairs at the start; later each key occurs once more, and the model predicts its value.

    An example begins with `num_pairs` pairs of a one-token key and a one-token value, all different. After
    the pairs every key is placed once, at an even distance. The i-th place has a probability proportional to
    i^(power - 1), so most keys recur soon. The label of the token after the key is the value, but the input
    there is *not*, so no answer is shown. All other tokens after the pairs are fillers, by default random
    tokens, which may be keys and values too. Ids: keys are 1 to vocab_size / 2 - 1, values are the upper
    half.

    This differs from Zoology in three ways. Labels stand one place further right, as everywhere in this
    package (the model shifts them). Each example has its own random stream, where Zoology draws a data set as
    a whole. And Zoology trains on a mixture of lengths and numbers of pairs in random order (64 tokens with 4
    pairs, 128 with 8, 256 with 16, 32 and 64), while a recipe here trains on lengths in rising order, each
    with as many pairs as fit (16 tokens with 4 pairs up to 128 with 32). The tests are the same: 64 tokens
    with 16 pairs up to 1024 with 256.

    Attributes:
        length: Tokens per example, T; Zoology tests up to 1024.
        vocab_size: Number of token ids.
        num_pairs: Pairs per example; `None` for a quarter of its tokens, the most that fit, up to 256.
        power: Exponent of the gaps: 1 makes all places equally likely, near 0 makes short gaps likely.
        use_random_fillers: Whether fillers are random tokens; otherwise they are 0.

    Raises:
        ValueError: If a field is out of range, or the pairs do not fit; says what was expected and found.

    Example:
        Three pairs, then each key once more; fillers are zeros here. Keys are tokens 1 to 7, values 8 to 15:

        >>> task = MQARTask(length=16, vocab_size=16, num_pairs=3, use_random_fillers=False)
        >>> inputs, labels, slices = task.build(0)
        >>> print(*inputs[0])
        1 10 4 8 7 14 4 0 0 0 0 0 1 0 7 0
        >>> print(*(label if label != -100 else "." for label in labels[0]))
        . . . . . . . 8 . . . . . 10 . 14

        The slices group the asked tokens by the distance from a key back to its first occurrence:

        >>> {name: int(mask.sum()) for name, mask in slices.items()}
        {'distance 2-3': 0, 'distance 4-7': 1, 'distance 8-15': 2}
    """

    name: ClassVar[str] = "mqar"
    length: int = 64
    vocab_size: int = 8192
    num_pairs: int | None = None
    power: float = 0.01
    use_random_fillers: bool = True

    def __post_init__(self) -> None:
        """Check every field, dependent ones last."""
        super().__post_init__()
        if self.length < 4 or self.length % 2:
            raise ValueError(f"length: expected an even number of at least 4 tokens, found {self.length}")
        if not 0 < self.power <= 1:
            raise ValueError(f"power: expected a number above 0 and at most 1, found {self.power}")
        most_pairs = self.length // 4
        if self.num_pairs is not None and not 1 <= self.num_pairs <= most_pairs:
            raise ValueError(
                f"num_pairs: expected between 1 and {most_pairs} (a quarter of the length), "
                f"found {self.num_pairs}"
            )
        if self.vocab_size < 2 * (self.num_stored + 1):
            raise ValueError(
                f"vocab_size: expected at least {2 * (self.num_stored + 1)} "
                f"({self.num_stored} different keys and values), found {self.vocab_size}"
            )

    @property
    def num_stored(self) -> int:
        """Pairs in an example."""
        return min(self.length // 4, 256) if self.num_pairs is None else self.num_pairs

    @property
    def context_length(self) -> int:
        """Tokens of all pairs."""
        return self.num_stored * _TOKENS_PER_PAIR

    def build(self, seed: int, *, indices: Sequence[int] = (0,), split: str = "train") -> TaskBatch:
        """Build the examples with these indices; see `Task.build` and the example of the class."""
        first_value = self.vocab_size // 2
        num_places = (self.length - self.context_length) // _TOKENS_PER_PAIR
        weights = np.arange(1, num_places + 1) ** (self.power - 1.0)
        weights /= weights.sum()
        shape = (len(indices), self.num_stored)
        keys, values, places = (np.empty(shape, dtype=np.int64) for _ in range(3))
        inputs = np.zeros((len(indices), self.length), dtype=np.int64)
        for row, index in enumerate(indices):
            rng = example_generator(seed, index, split=split)
            keys[row] = _FIRST_KEY + rng.choice(first_value - _FIRST_KEY, self.num_stored, replace=False)
            values[row] = first_value + rng.choice(
                self.vocab_size - first_value, self.num_stored, replace=False
            )
            places[row] = rng.choice(num_places, self.num_stored, replace=False, p=weights)
            if self.use_random_fillers:
                inputs[row] = rng.integers(self.vocab_size, size=self.length)

        rows = np.arange(len(indices))[:, None]
        inputs[:, 0 : self.context_length : 2] = keys
        inputs[:, 1 : self.context_length : 2] = values
        key_positions = self.context_length + places * _TOKENS_PER_PAIR
        inputs[rows, key_positions] = keys
        labels = np.full_like(inputs, IGNORE_INDEX)
        labels[rows, key_positions + 1] = values

        distances = np.zeros_like(inputs)
        distances[rows, key_positions + 1] = key_positions - np.arange(self.num_stored) * _TOKENS_PER_PAIR
        is_asked = labels != IGNORE_INDEX
        slices = distance_masks(distances[is_asked].reshape(shape), is_asked, smallest=_TOKENS_PER_PAIR)
        return TaskBatch(inputs, labels, slices)
