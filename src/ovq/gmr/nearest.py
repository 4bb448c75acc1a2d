"""Clusters by the shortest edges from items to their nearest ones, in plain NumPy, apart from the op."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ovq.ops.options import TIE


def nearest_clusters(
    points: NDArray[np.float64], count: NDArray[np.float64], movers: Iterable[int], num_left: int
) -> NDArray[np.intp]:
    """Join items along the shortest edges until `num_left` clusters are left.

    Args:
        points: `[n, D]` the items; an item may be the mean of several points.
        count: `[n]` the number of points that each item stands for.
        movers: the items that look for another. Where their edges are too few, all clusters do.
        num_left: the number of clusters that are to be left.

    Returns:
        For each item, the lowest item of its cluster, `[n]`.

    Example:
        >>> nearest_clusters(np.array([[0.0], [5.0], [0.1], [5.3], [9.0]]), np.ones(5), range(5), 3)
        array([0, 1, 0, 1, 4])
    """
    lowest = np.arange(len(points))
    while len(left := np.unique(lowest)) > num_left:
        weights = (lowest == left[:, None]) * count
        means = weights @ points / weights.sum(1, keepdims=True)
        tie = TIE * np.square(means).sum(1).max()
        distance = np.stack([np.square(means - x).sum(1) for x in means])
        np.fill_diagonal(distance, np.inf)
        target = (distance <= distance.min(1, keepdims=True) + tie).argmax(1)
        looking = np.isin(left, list(movers))
        index = np.arange(len(left))
        # Of two that are each other's nearest, the edge of the first has no part.
        looking &= ~((target[target] == index) & looking[target] & (index < target))
        length = np.where(looking, distance[index, target], np.inf)
        num = min(len(left) - num_left, looking.sum())
        last = np.sort(length)[num - 1]
        order = np.concatenate(
            [np.flatnonzero(length < last - tie), np.flatnonzero(abs(length - last) <= tie)]
        )
        for a in order[:num]:
            ends = lowest[left[a]], lowest[left[target[a]]]
            lowest[lowest == max(ends)] = min(ends)
        movers = left
    return lowest
