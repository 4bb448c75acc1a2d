"""The clustering of `merge="nearest"`, by shortest nearest-item edges, in NumPy and independent of the op."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ovq.ops.options import MASS_POWER, NUM_PARTS, TIE


def nearest_clusters(
    points: NDArray[np.float64], count: NDArray[np.float64], searching: Iterable[int], num_left: int
) -> NDArray[np.intp]:
    """Join items along the shortest edges until `num_left` clusters are left.

    Args:
        points: `[n, D]` the items; an item may be the mean of several points.
        count: `[n]` the number of points that each item stands for.
        searching: the items that get an edge to their nearest item. If edges run out, all clusters get one.
        num_left: the number of clusters to stop at.

    Returns:
        For each item, the lowest item of its cluster, `[n]`.

    Example:
        >>> nearest_clusters(np.array([[0.0], [5.0], [0.1], [5.3], [9.0]]), np.ones(5), range(5), 3)
        array([0, 1, 0, 1, 4])
    """
    index = lowest = np.arange(len(points))
    target, size = index, np.square(points).sum(1).max()
    is_searching, num_parts = np.isin(index, list(searching)), 0
    while (due := len(np.unique(lowest)) - num_left) > 0:
        num_parts += 1
        is_member = lowest == index[:, None]
        is_left, mass = is_member.any(1), is_member @ count
        means = (is_member * count) @ points / np.where(is_left, mass, 1)[:, None]
        distance = np.stack([np.square(means - x).sum(1) for x in means]) / (size or 1)
        distance[:, ~is_left] = np.inf
        np.fill_diagonal(distance, np.inf)
        nearest = (distance <= distance.min(1, keepdims=True) + TIE).argmax(1)
        target = np.where(is_searching & is_left, nearest, np.where(is_left, lowest[target], index))
        has_edge = (target != index) & np.array([not _ends_cycle(int(a), target) for a in index])
        weight = (mass * mass[target] / (mass + mass[target] + ~is_left)) ** MASS_POWER
        priority = np.where(has_edge, np.where(has_edge, distance[index, target], 0) * weight, np.inf)
        num = min((due + 1) // 2 if num_parts < NUM_PARTS else due, has_edge.sum())
        last = np.sort(priority)[num - 1]
        tie = TIE * max(last, 1)
        order = [*np.flatnonzero(priority < last - tie), *np.flatnonzero(abs(priority - last) <= tie)]
        before = lowest
        for a in order[:num]:
            ends = lowest[a], lowest[target[a]]
            lowest = np.where(lowest == max(ends), min(ends), lowest)
        # Merged items search again, other edges follow their targets; after the last part, all items search.
        is_searching = np.isin(index, lowest[(before != lowest) | (num_parts >= NUM_PARTS)])
    return lowest


def _ends_cycle(a: int, target: NDArray[np.intp]) -> bool:
    """Whether item a is the lowest item of a cycle of edges."""
    path = [a]
    while (b := int(target[path[-1]])) not in path:
        path.append(b)
    return b == a and min(path) == a
