"""merge="ward-sqrt": decides which items are merged, one cheapest pair after the other.

With a `count_power` below 1 the costs are not reducible: a merged item can come nearer to a third one than
both of its parts were. What `ward.py` knows of merges to come does not hold then, so there are as many steps
as merges. A step changes one row and one column of the table of costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.options import TIE, TINY

# Bytes of the tables of distances and costs that are held at once: streams are taken in groups.
_TABLE_BYTES = 2**28
# A distance is a difference of larger numbers, rounded to this share of them or less. Heavy items multiply
# what rounding left.
_ROUNDING = 2.0**-46
# Below this share of those numbers, a distance is computed again from the points.
_CLOSE = 1e-6
# How many are at once.
_PAIRS = 2**16


def cluster_roots_one_by_one(
    points: Tensor, count: Tensor, due: list[int], count_power: float, weight: Tensor | None = None
) -> Tensor:
    """For each item, the lowest item `[S, M]` of the cluster it ends in, after `due[s]` merges in stream s.

    Args:
        points: `[S, M, D]` float64, from `pair_points`.
        count: `[S, M]`, 0 for an item that is not there.
        due: how many merges to make in each stream.
        count_power: the exponent of c_a c_b / (c_a + c_b) in the cost.
        weight: `[S, M]` what stands in the place of counts there; None for the counts.
    """
    weight = count if weight is None else weight
    num_items = points.shape[1]
    left = torch.tensor(due, device=points.device)
    size = max(1, _TABLE_BYTES // max(1, 16 * num_items**2))
    groups = (part.split(size) for part in (points, weight.double(), count > 0, left))
    parents = [_Merger(x, c, there, count_power).merge(n) for x, c, there, n in zip(*groups, strict=True)]
    roots = torch.cat(parents) if parents else count.new_zeros(count.shape)
    while not torch.equal(above := roots.gather(1, roots), roots):
        roots = above
    return roots


class _Merger:
    """The items of some streams, with tables of their distances and costs.

    Args:
        x: `[S, M, D]` float64.
        count: `[S, M]` float64 counts or weights.
        is_there: `[S, M]` items that there are.
        count_power: the exponent.
    """

    def __init__(self, x: Tensor, count: Tensor, is_there: Tensor, count_power: float) -> None:
        self._x, self._count, self._power = x.clone(), count.masked_fill(~is_there, 0), count_power
        self._is_left = is_there.clone()
        square = x.square().sum(-1)
        is_usable = square.isfinite() & self._is_left
        self._tie = TIE * square.masked_fill(~is_usable, 0).amax(-1, keepdim=True)
        distance = torch.baddbmm(square[:, None], x, x.transpose(1, 2), alpha=-2)
        distance += square[..., None]
        # Products may be rounded differently on the two sides of the diagonal.
        self._distance = (distance + distance.transpose(1, 2)).mul_(0.5)
        self._distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        masses = self._count[..., None], self._count[:, None]
        s, i, j = self._doubtful(
            self._distance, square[..., None] + square[:, None], *masses, self._tie[..., None]
        )
        self._distance[s, i, j] = self._exact(s, i, j)
        self._cost = self._costs(self._distance, *masses, self._tie[..., None])
        self._cost.masked_fill_(~(self._is_left[:, None] & self._is_left[..., None]), torch.inf)
        self._near = self._cost.amin(-1)

    def merge(self, left: Tensor) -> Tensor:
        """Make `left` `[S]` merges; returns for each item `[S, M]` the one it was merged into, or itself."""
        num_items = self._count.shape[1]
        parent = torch.arange(num_items, device=left.device).repeat(len(left), 1)
        for step in range(int(left.max()) if len(left) else 0):
            s = (left > step).nonzero()[:, 0]
            a, b = self._cheapest(s)
            parent[s, b] = a
            self._merge_pairs(s, a, b)
        return parent

    def _factor(self, count: Tensor, other: Tensor) -> Tensor:
        """What the distances of items of these masses are multiplied by."""
        # Items that are not there have a count of 0; others may have a weight of 0.
        return (count * other / (count + other).clamp(min=TINY)).pow_(self._power)

    def _doubtful(
        self, distance: Tensor, size: Tensor, count: Tensor, other: Tensor, tie: Tensor
    ) -> tuple[Tensor, ...]:
        """Where distances are so small beside the numbers `size` that they are differences of, and the items
        so heavy, that rounding decides what they cost."""
        is_doubtful = (distance <= _CLOSE * size) & (self._factor(count, other) * size * _ROUNDING > tie)
        return is_doubtful.nonzero(as_tuple=True)

    def _exact(self, s: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Squared distances `[P]` of items i and j of streams s, from differences."""
        pieces = zip(s.split(_PAIRS), i.split(_PAIRS), j.split(_PAIRS), strict=True)
        return torch.cat([(self._x[s, i] - self._x[s, j]).square().sum(-1) for s, i, j in pieces])

    def _costs(self, distance: Tensor, count: Tensor, other: Tensor, tie: Tensor) -> Tensor:
        """Costs of merging items that far apart; costs within rounding of zero count as zero."""
        cost = self._factor(count, other).mul_(distance)
        cost.masked_fill_(~cost.isfinite(), torch.inf)
        return cost.masked_fill_(cost <= tie, 0)

    def _cheapest(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Of the cheapest pairs of streams `s`, those with the lowest first item, then the lowest second."""
        is_left, near = self._is_left[s], self._near[s]
        most = near.masked_fill(~is_left, torch.inf).amin(-1, keepdim=True) + self._tie[s]
        a = (is_left & (near <= most)).byte().argmax(-1)
        is_other = is_left.scatter(1, a[:, None], False)
        return a, (is_other & (self._cost[s, a] <= most)).byte().argmax(-1)

    def _merge_pairs(self, s: Tensor, a: Tensor, b: Tensor) -> None:
        """Merge item b into item a in each of the streams `s`."""
        count, near = self._count[s], self._near[s]
        had_near = (self._cost[s, a] <= near) | (self._cost[s, b] <= near)
        c, d = self._count[s, a], self._count[s, b]
        self._count[s, a] = total = c + d
        self._count[s, b] = 0
        self._is_left[s, b] = False
        is_left = self._is_left[s]
        # The distance of a mean of two points follows from theirs.
        share = (d / total.clamp(min=TINY))[:, None]
        between = self._distance[s, a, b][:, None]
        size = torch.lerp(self._distance[s, a], self._distance[s, b], share)
        distance = size - share * (1 - share) * between
        x = (c[:, None] * self._x[s, a] + d[:, None] * self._x[s, b]) / total.clamp(min=TINY)[:, None]
        self._x[s, a] = torch.where(total[:, None] > 0, x, self._x[s, a])
        group, item = self._doubtful(distance, size, total[:, None], count, self._tie[s])
        distance[group, item] = self._exact(s[group], a[group], item)
        distance.scatter_(1, a[:, None], torch.inf)
        cost = self._costs(distance, total[:, None], count, self._tie[s])
        cost.masked_fill_(~is_left, torch.inf).scatter_(1, a[:, None], torch.inf)
        self._distance[s, a] = distance
        self._distance[s, :, a] = distance
        for item, costs in ((a, cost), (b, torch.full_like(cost, torch.inf))):
            self._cost[s, item] = costs
            self._cost[s, :, item] = costs
        near = torch.minimum(near, cost).scatter(1, a[:, None], cost.amin(-1, keepdim=True))
        self._near[s] = near.masked_fill(~is_left, torch.inf)
        # Items that were nearest to one of the two look for another.
        group, item = (had_near & is_left).nonzero(as_tuple=True)
        self._near[s[group], item] = self._cost[s[group], item].amin(-1)
