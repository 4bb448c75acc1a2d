"""merge="ward" for many heads at once: decides in rounds which items are merged, the cheapest pairs first.

Ward's costs are *reducible*: when the cheapest pair is merged, the merged item is no nearer to any other item
than the nearer of its parts was. Take the pairs that are each other's nearest. Those that are certain to be
among the next merges can therefore be merged at once, with the same result as one by one. With `due` merges
to go, they are the pairs among the `due` items with the cheapest nearest partners (`docs/math.md`, section 5,
has the proof). Where costs tie the order matters, and pairs are merged one at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.one_by_one import cluster_roots_one_by_one
from ovq.ops.options import TIE


def pair_points(keys: Tensor, values: Tensor, count: Tensor, value_weight: float) -> Tensor:
    """Items as points `[S, M, K + V]` in float64; the rule's distances are those between these points.

    Args:
        keys: `[S, M, K]` mean keys. values: `[S, M, V]` mean values.
        count: `[S, M]` counts or weights, 0 for an item that is not there.
        value_weight: w; values are scaled by w divided by the root of their mean squared length.
    """
    keys, values = keys.double(), values.double()
    factor = value_factor(values.square().sum(-1), count, value_weight)
    return torch.cat([keys, values * factor[:, None, None]], -1)


def value_factor(lengths: Tensor, count: Tensor, value_weight: float) -> Tensor:
    """What values are scaled by, `[S]`, from squared lengths `[S, M]` in float64; see `pair_points`."""
    weights = count.double().masked_fill(~lengths.isfinite(), 0)
    total = (weights * lengths.nan_to_num(0, 0, 0)).sum(-1)
    weight = weights.sum(-1)
    power = total / torch.where(weight > 0, weight, 1)
    return torch.where((power > 0) & power.isfinite(), value_weight / power.sqrt(), 0)


def cluster_roots(
    points: Tensor,
    count: Tensor,
    due: list[int],
    *,
    count_power: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """For each item, the lowest item `[S, M]` of the cluster it ends in, after `due[s]` merges in stream s.

    Args:
        points: `[S, M, D]` from `pair_points`; overwritten.
        count: `[S, M]`, 0 for an item that is not there.
        due: how many merges to make in each stream.
        count_power: how much counts matter for the cost, see `Options`. Only at 1 are costs reducible.
        weight: `[S, M]` what stands in the place of counts in the costs; None for the counts.
    """
    # Items of hardly any weight cost nothing to merge with any other: of so many ties the order decides.
    if count_power != 1 or weight is not None:
        return cluster_roots_one_by_one(points, count, due, count_power, weight)
    merger = _Merger(points, count)
    left = torch.tensor(due, device=points.device)
    while bool((left > 0).any()):
        left -= merger.merge_round(left)
    return merger.roots()


# Items whose costs with all others are computed together.
_ROWS = 256


class _Merger:
    """Merges the items of many streams into clusters.

    Args:
        x: `[S, M, D]` float64; overwritten.
        count: `[S, M]`.
    """

    def __init__(self, x: Tensor, count: Tensor) -> None:
        self._x, self._count = x, count.double()
        self._is_left = count > 0
        self._index = torch.arange(x.shape[1], device=x.device)
        self._parent = self._index.repeat(len(x), 1)
        self._square = x.square().sum(-1)
        is_usable = self._square.isfinite() & self._is_left
        self._tie = TIE * self._square.masked_fill(~is_usable, 0).amax(-1, keepdim=True)
        self._near = x.new_full(x.shape[:2], torch.inf)
        self._partner = self._parent.clone()
        self._find_nearest(self._is_left)

    def merge_round(self, left: Tensor) -> Tensor:
        """Merge the pairs that can be merged at once, at most `left` `[S]`; returns how many were, `[S]`."""
        index, num = self._index, len(self._index)
        first, last = torch.minimum(index, self._partner), torch.maximum(index, self._partner)
        is_mutual = self._partner.gather(1, self._partner) == index
        is_pair = self._is_left & (self._partner != index)
        # A pair that is each other's nearest counts once, at its later item.
        is_pair &= ~(is_mutual & (index == first))
        near = self._near.masked_fill(~is_pair, torch.inf)
        ranked = near.sort(-1).values
        lowest = ranked[:, :1]
        # Only the `left` items with the cheapest nearest partners can take part in the next merges.
        of_items = self._near.masked_fill(~self._is_left, torch.inf).sort(-1).values
        limit = of_items.gather(1, (left - 1).clamp(min=0)[:, None])
        is_close = (ranked[:, 1:] - ranked[:, :-1] <= self._tie) & (ranked[:, 1:] <= limit + self._tie)
        is_tied = is_close.any(-1, keepdim=True) | ~lowest.isfinite()
        # Repeated items merge at no cost, so before all others, starting with those of the lowest item.
        is_free = is_pair & (near == 0) & (index == last)
        has_free = is_free.any(-1, keepdim=True)
        is_sure = is_pair & is_mutual & (near <= torch.maximum(limit, lowest)) & near.isfinite()
        is_cheapest = is_pair & (near <= lowest + self._tie)
        is_chosen = torch.where(has_free, is_free, torch.where(is_tied, is_cheapest, is_sure))
        most = torch.where(is_tied & ~has_free, left.clamp(max=1)[:, None], left[:, None])
        order = torch.where(is_chosen, first * num + last, num * num)
        is_chosen &= order.argsort(-1).argsort(-1) < most
        self._merge(is_chosen, first)
        return is_chosen.sum(-1)

    def roots(self) -> Tensor:
        """The lowest item of each item's cluster."""
        roots = self._parent
        while not torch.equal(above := roots.gather(1, roots), roots):
            roots = above
        return roots

    def _merge(self, is_chosen: Tensor, first: Tensor) -> None:
        """Merge each chosen item, or the partner that comes after it, into the one that comes first."""
        s, i = is_chosen.nonzero(as_tuple=True)
        a = first[s, i]
        b = torch.maximum(i, self._partner[s, i])
        self._parent[s, b] = a
        a = self.roots()[s, a]
        self._is_left[s, b] = False
        # Add up the clusters, then divide to get means again.
        rows, dim = self._x.view(-1, self._x.shape[-1]), self._x.shape[1]
        weight = self._count.view(-1)
        into, of = s * dim + a, s * dim + b
        roots = into.unique()
        rows[roots] *= weight[roots, None]
        rows.index_add_(0, into, rows[of] * weight[of, None])
        weight.index_add_(0, into, weight[of])
        rows[roots] /= weight[roots, None]
        self._square.view(-1)[roots] = rows[roots].square().sum(-1)
        is_stale = torch.zeros_like(self._is_left)
        is_stale.view(-1)[roots] = True
        is_gone = is_stale | ~self._is_left
        self._find_nearest(self._is_left & (is_stale | is_gone.gather(1, self._partner)))

    def _find_nearest(self, is_wanted: Tensor) -> None:
        """Find the nearest item, and the cost of merging with it, for each item wanted."""
        num = is_wanted.sum(-1)
        order = (~is_wanted).byte().argsort(dim=-1, stable=True)
        for start in range(0, int(num.max()) if len(num) else 0, _ROWS):
            items = order[:, start : min(start + _ROWS, int(num.max()))]
            is_real = is_wanted.gather(1, items)
            cost, is_there = self._costs(items)
            best = cost.amin(-1, keepdim=True)
            # Of equally near items, take the first.
            partner = (is_there & (cost <= best + self._tie[..., None])).byte().argmax(-1)
            near = self._exact(items, partner)
            self._near.scatter_(1, items, torch.where(is_real, near, self._near.gather(1, items)))
            self._partner.scatter_(1, items, torch.where(is_real, partner, self._partner.gather(1, items)))

    def _costs(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Costs `[S, R, M]` of merging items `[S, R]` with each other item, and which of those exist."""
        x = self._x.gather(1, items[..., None].expand(-1, -1, self._x.shape[-1]))
        own, count = self._count.gather(1, items)[..., None], self._count[:, None]
        distances = torch.bmm(x, self._x.transpose(1, 2)).mul_(-2)
        distances += self._square.gather(1, items)[..., None]
        distances += self._square[:, None]
        cost = distances.mul_(own * count / (own + count))
        is_there = self._is_left[:, None] & (self._index != items[..., None])
        cost.masked_fill_(~(cost.isfinite() & is_there), torch.inf)
        return cost.masked_fill_(cost <= self._tie[..., None], 0), is_there

    def _exact(self, items: Tensor, partner: Tensor) -> Tensor:
        """Costs `[S, R]` of items with their partners, from differences, so that no digits cancel."""
        width = self._x.shape[-1]
        x, y = (self._x.gather(1, i[..., None].expand(-1, -1, width)) for i in (items, partner))
        c, d = self._count.gather(1, items), self._count.gather(1, partner)
        cost = c * d / (c + d) * (x - y).square().sum(-1)
        cost.masked_fill_(~cost.isfinite(), torch.inf)
        return cost.masked_fill_(cost <= self._tie, 0)
