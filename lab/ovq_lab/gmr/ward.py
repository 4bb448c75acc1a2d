"""Ward's clustering with a weight per point, exact and in order of cost, in plain NumPy.

The op computes the costs of a merged pair from its mean; this file computes them from the costs of its two
parts, by the formula of Lance and Williams (`docs/method/math.md`, section 5), so that each checks the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovq.ops.options import TIE


def ward_clusters(points: NDArray[np.float64], count: NDArray[np.float64], num_left: int) -> NDArray[np.intp]:
    """Merge the cheapest pair of items until `num_left` clusters are left.

    The cost of a pair is the increase of the sum of squared distances between points and their cluster means.

    Args:
        points: `[n, D]` the items; an item may be the mean of several points.
        count: `[n]` the number of points that each item stands for.
        num_left: the number of clusters to stop at.

    Returns:
        For each item, the lowest item of its cluster, `[n]`.

    Example:
        >>> ward_clusters(np.array([[0.0], [5.0], [0.1], [5.3]]), np.ones(4), 2)
        array([0, 1, 0, 1])
    """
    index = np.arange(len(points))
    lowest, count = index.copy(), count.copy()
    tie = TIE * np.square(points).sum(1).max()
    cost = np.stack([np.square(points - x).sum(1) for x in points])
    cost *= count[:, None] * count / (count[:, None] + count)
    cost[index, index] = np.inf
    for _ in range(len(points) - num_left):
        best = cost.min()
        # Costs within rounding of zero count as zero; of equally cheap pairs, the first is merged.
        limit = tie if best <= tie else best + tie
        a, b = divmod(int((cost <= limit).argmax()), len(points))
        merged = (count[a] + count) * cost[a] + (count[b] + count) * cost[b] - count * cost[a, b]
        cost[a] = cost[:, a] = merged / (count[a] + count[b] + count)
        cost[b] = cost[:, b] = np.inf
        count[a] += count[b]
        lowest[lowest == b] = a
    return lowest
