"""In-context linear regression: many linear functions at once, each inferred from its points.

In recall, the answer itself was stored. Here it was not: the model has to select the points of one function
among those of all others, and infer the function from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ovq.fields import check_at_least
from ovq_lab.tasks.base import IGNORE_INDEX, Task, TaskBatch, example_generator

FILLER = 0
"""Token before the first point, if the length is not a multiple of a point's three tokens."""
_FIRST_NAME = 1
_TOKENS_PER_POINT = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionTask(Task):
    """Points of many functions y = a x + b in a random order, each point as `name, x, y`.

    Slopes a, offsets b and arguments x are integers, all equally likely, between plus and minus `max_slope`,
    `max_offset` and `max_x`. So y is an integer, and two points determine a function. All numbers are tokens.
    The range is finite, so that answers can be right or wrong; it is made of integers, not of a finite field,
    so that answers can also be wrong by a little. Both choices are [ours], as the paper's layout is not
    public. An argument repeats only after all others have occurred, so that nothing can be looked up within
    the first `2 max_x + 1` points of a function. A y is asked for once `min_seen` points of its function have
    been seen. Ids: 0 is the filler, then come the names of functions, then the 2 max_x + 1 arguments in
    rising order, then all values of y in rising order.

    Attributes:
        length: Tokens per example, T.
        vocab_size: Number of token ids; ids that are neither filler nor numbers are names.
        points_per_function: Points per function in an example, on average. Longer examples therefore have
            more functions, up to `max_functions`, and beyond that more points of each.
        max_functions: Largest number of functions in an example.
        max_slope: Largest |a|.
        max_offset: Largest |b|.
        max_x: Largest |x|.
        min_seen: Points of a function that come before its first question.

    Raises:
        ValueError: If a field is out of range, the length has no room for a question, or there are too few
            names; says what was expected and found.

    Example:
        Three points of each of two functions, named 1 (y = 1) and 2 (y = 1 - x). The arguments -1, 0 and 1
        are tokens 7 to 9, and y = -2, ..., 2 are tokens 10 to 14; names are tokens 1 to 6:

        >>> task = RegressionTask(
        ...     length=19, vocab_size=15, points_per_function=3, max_slope=1, max_offset=1, max_x=1
        ... )
        >>> inputs, labels, slices = task.build(0)
        >>> print(*inputs[0])
        0 2 7 14 1 8 13 2 8 13 2 9 12 1 7 13 1 9 13
        >>> print(*(label if label != -100 else "." for label in labels[0]))
        . . . . . . . . . . . . 12 . . . . . 13

        The slices group the asked tokens by how many points of the same function came before them:

        >>> {name: int(mask.sum()) for name, mask in slices.items()}
        {'seen 2-3': 2}
        >>> task.errors(answers=np.array([12, 3]), labels=np.array([14, 14]))
        array([2., 5.])
    """

    name: ClassVar[str] = "regression"
    error_name: ClassVar[str] = "mean absolute error of y"
    points_per_function: int = 8
    max_functions: int = 128
    max_slope: int = 2
    max_offset: int = 4
    max_x: int = 3
    min_seen: int = 2

    def __post_init__(self) -> None:
        """Check every field, dependent ones last."""
        super().__post_init__()
        check_at_least(1, self, "points_per_function", "max_functions")
        check_at_least(0, self, "max_slope", "max_offset", "max_x", "min_seen")
        shortest = _TOKENS_PER_POINT * (self.min_seen + 1)
        if self.length < shortest:
            raise ValueError(
                f"length: expected at least {shortest} tokens (the points before a question, and it), "
                f"found {self.length}"
            )
        if self.points_per_function <= self.min_seen:
            raise ValueError(
                f"points_per_function: expected more than min_seen ({self.min_seen}), "
                f"found {self.points_per_function}"
            )
        if self.num_names < self.num_functions:
            raise ValueError(
                f"vocab_size: expected at least {self.vocab_size - self.num_names + self.num_functions} "
                f"(a name for each of {self.num_functions} functions, and the numbers), "
                f"found {self.vocab_size}"
            )

    @property
    def num_points(self) -> int:
        """Points in an example, of all functions together."""
        return self.length // _TOKENS_PER_POINT

    @property
    def num_functions(self) -> int:
        """Functions in an example."""
        return min(self.max_functions, max(1, self.num_points // self.points_per_function))

    @property
    def max_y(self) -> int:
        """Largest possible |y|."""
        return self.max_slope * self.max_x + self.max_offset

    @property
    def num_names(self) -> int:
        """Number of ids that names are drawn from."""
        return self.vocab_size - _FIRST_NAME - (2 * self.max_x + 1) - (2 * self.max_y + 1)

    @property
    def first_x_token(self) -> int:
        """The id of the smallest argument."""
        return _FIRST_NAME + self.num_names

    @property
    def first_y_token(self) -> int:
        """The id of the smallest value."""
        return self.first_x_token + 2 * self.max_x + 1

    def errors(self, answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """|answer - y|; an answer that is not a value of y has the width of the range of y as its error."""
        distance = np.abs(answers - labels).astype(float)
        return np.where(answers >= self.first_y_token, distance, 2.0 * self.max_y + 1)

    def build(self, seed: int, *, indices: Sequence[int] = (0,), split: str = "train") -> TaskBatch:
        """Build the examples with these indices; see `Task.build` and the example of the class."""
        num_points = self.num_points
        points = np.empty((len(indices), num_points, _TOKENS_PER_POINT), dtype=np.int64)
        seen = np.empty((len(indices), num_points), dtype=np.int64)
        for row, index in enumerate(indices):
            points[row], seen[row] = self._draw(example_generator(seed, index, split=split))

        inputs = np.full((len(indices), self.length), FILLER, dtype=np.int64)
        first = self.length - num_points * _TOKENS_PER_POINT
        inputs[:, first:] = points.reshape(len(indices), num_points * _TOKENS_PER_POINT)
        labels = np.full_like(inputs, IGNORE_INDEX)
        y_positions = slice(first + _TOKENS_PER_POINT - 1, None, _TOKENS_PER_POINT)
        is_asked = seen >= self.min_seen
        labels[:, y_positions] = np.where(is_asked, points[..., 2], IGNORE_INDEX)

        slices = {}
        for low, high in self._ranges_of_seen():
            mask = np.zeros(inputs.shape, dtype=bool)
            mask[:, y_positions] = is_asked & (low <= seen) & (seen <= high)
            slices[f"seen {low}" if low == high else f"seen {low}-{high}"] = mask
        return TaskBatch(inputs, labels, slices)

    def _ranges_of_seen(self) -> list[tuple[int, int]]:
        """The ranges of `seen` for the slices (0, 1, 2-3, 4-7, ...) that can contain questions."""
        ranges = [(0, 0)] + [
            (2**octave, 2 ** (octave + 1) - 1) for octave in range(self.num_points.bit_length())
        ]
        most = -(-self.num_points // self.num_functions) - 1
        return [(low, high) for low, high in ranges if self.min_seen <= high and low <= most]

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One example: its points `[num_points, 3]` as tokens, and for each the number of earlier points of
        its function."""
        num_functions, num_points, num_arguments = self.num_functions, self.num_points, 2 * self.max_x + 1
        names = _FIRST_NAME + rng.permutation(self.num_names)[:num_functions]
        slopes = rng.integers(-self.max_slope, self.max_slope + 1, num_functions)
        offsets = rng.integers(-self.max_offset, self.max_offset + 1, num_functions)
        owners = rng.permutation(np.arange(num_points) % num_functions)
        # As the sort is stable, the rank of a point within its function is the number of earlier points.
        order = np.argsort(owners, kind="stable")
        counts = np.bincount(owners, minlength=num_functions)
        seen = np.empty(num_points, dtype=np.int64)
        seen[order] = np.arange(num_points) - np.repeat(np.cumsum(counts) - counts, counts)

        # Each function goes through all arguments in rounds, each round in a new order.
        num_rounds = -(-int(counts.max()) // num_arguments)
        rounds = rng.permuted(
            np.broadcast_to(np.arange(num_arguments), (num_functions, num_rounds, num_arguments)), axis=2
        )
        x = rounds.reshape(num_functions, -1)[owners, seen]
        y = slopes[owners] * (x - self.max_x) + offsets[owners] + self.max_y
        return np.stack([names[owners], x + self.first_x_token, y + self.first_y_token], axis=1), seen
