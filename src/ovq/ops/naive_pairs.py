"""Reference implementation of the rules that merge pairs of items (`docs/method/math.md`, section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ovq.ops.options import COUNT_POWERS, NO_DISTANCE, NUM_PARTS, TIE, Options
from ovq.ops.sums import divisor


@torch.no_grad()
def points(keys: Tensor, values: Tensor, mass: Tensor, options: Options) -> Tensor:
    """Items as points (keys, scaled values) `[M, K + V]` in float64, for squared distances."""
    # The means come in the dtype of the sums, as the read uses them.
    keys, values, c = keys.double(), values.double(), mass.double()
    lengths = values.square().sum(-1)
    is_finite = lengths.isfinite()
    power = (c * lengths)[is_finite].sum() / divisor(c[is_finite].sum(), c.dtype)
    return torch.cat([keys, values * (options.value_weight / power.sqrt() if power > 0 else 0.0)], -1)


@torch.no_grad()
def cheapest_clusters(x: Tensor, mass: Tensor, num_merges: int, options: Options) -> list[list[int]]:
    """Greedy merging, cheapest pair first. Returns the items of each cluster, ordered by lowest item."""
    x, c = x.clone(), mass.double().clone()
    squares = x.square().sum(-1)
    tie = TIE * float(squares[squares.isfinite()].max()) if squares.isfinite().any() else 0.0

    def cost(a: int) -> Tensor:
        """Cost of merging item a with each other item.

        By "ward", the growth of the sum of squared distances to means; by "ward-sqrt", counts matter less.
        """
        squared = (x - x[a]).square().sum(-1)
        weight = (c * c[a] / divisor(c + c[a], c.dtype)) ** COUNT_POWERS[options.merge]
        costs = torch.where(squared.isfinite(), weight * squared, torch.inf)
        # Costs within rounding of zero count as zero.
        return costs.masked_fill(costs <= tie, 0)

    costs = torch.stack([cost(a) for a in range(len(c))])
    clusters = {i: [i] for i in range(len(c))}
    costs = costs.masked_fill(torch.ones_like(costs, dtype=torch.bool).tril(), torch.nan)
    for _ in range(num_merges):
        best = costs[~costs.isnan()].min()
        # Ties: lowest first item, then lowest second item.
        a, b = (costs <= best + tie).nonzero()[0].tolist()
        if c[a] + c[b] > 0:
            x[a] = (c[a] * x[a] + c[b] * x[b]) / (c[a] + c[b])
        c[a] += c[b]
        clusters[a] = sorted(clusters[a] + clusters.pop(b))
        costs[b], costs[:, b] = torch.nan, torch.nan
        new = cost(a)
        costs[a] = torch.where(costs[a].isnan(), torch.nan, new)
        costs[:, a] = torch.where(costs[:, a].isnan(), torch.nan, new)
    return list(clusters.values())


@torch.no_grad()
def nearest_clusters(
    x: Tensor, mass: Tensor, movers: Sequence[int], num_merges: int, mass_power: float
) -> list[list[int]]:
    """Merge along the shortest edges from movers to nearest items. Returns the items of each cluster."""
    x, mass = x.clone(), mass.to(torch.float64, copy=True)
    squares = x.square().sum(-1)
    size = max((float(s) for s, m in zip(squares, mass, strict=True) if m > 0 and s.isfinite()), default=0.0)
    # A cluster is stored at the index of its lowest item.
    clusters = {i: [i] for i in range(len(x))}
    edges = {a: _nearest_item(a, x, mass, list(clusters), size or 1.0) for a in movers}
    num_parts = 0
    while num_merges > 0:
        num_parts += 1
        part = (num_merges + 1) // 2 if num_parts < NUM_PARTS else num_merges
        chosen = {a: b for a, b in edges.items() if a != b and a != _lowest_of_cycle(a, edges)}
        priority = {a: _edge_priority(a, b, x, mass, size or 1.0, mass_power) for a, b in chosen.items()}
        taken = lowest(priority, sorted(chosen), min(part, len(chosen)))
        trees: dict[int, list[int]] = {}
        for i in clusters:
            root = i
            while root in taken:
                root = chosen[root]
            trees.setdefault(root, []).append(i)
        trees_of = {min(tree): tree for tree in trees.values()}
        home = {i: place for place, tree in trees_of.items() for i in tree}
        for place, tree in trees_of.items():
            if len(tree) == 1:
                continue
            total = mass[tree].sum()
            x[place] = (mass[tree, None] * x[tree]).sum(0) / divisor(total, mass.dtype)
            mass[place] = total
            clusters[place] = sorted(j for i in tree for j in clusters.pop(i))
        num_merges -= len(taken)
        # Merged clusters search again; other edges follow their targets into the merged clusters. If merges
        # are still due after all parts, every cluster searches again.
        looking = [i for i in clusters if num_parts >= NUM_PARTS or len(trees_of[i]) > 1]
        edges = {a: home[b] for a, b in edges.items() if a in clusters and a not in looking}
        edges |= {a: _nearest_item(a, x, mass, sorted(clusters), size or 1.0) for a in looking}
    return [clusters[i] for i in sorted(clusters)]


def _squared_distances(a: int, others: list[int], x: Tensor, mass: Tensor, size: float) -> Tensor:
    """Squared distances of item a to others, relative to `size`."""
    if mass[a] <= 0:  # An item of zero mass is at distance 0 from every other.
        return mass.new_zeros(len(others))
    distance = (x[others] - x[a]).square().sum(-1) / size
    return distance.masked_fill(~distance.isfinite(), NO_DISTANCE)


def _nearest_item(a: int, x: Tensor, mass: Tensor, items: list[int], size: float) -> int:
    """Item nearest to item a (ties: lowest index); a itself if there is no other.

    Items of zero mass are no targets, unless all items have zero mass.
    """
    has_mass = (mass > 0).tolist()
    targets = [b for b in items if has_mass[b]] or items
    others = [b for b in targets if b != a]
    if not others:
        return a
    distance = _squared_distances(a, others, x, mass, size)
    return others[int((distance <= distance.min() + TIE).nonzero()[0])]


def _edge_priority(a: int, b: int, x: Tensor, mass: Tensor, size: float, mass_power: float) -> float:
    """Priority of an edge, lowest first: squared distance times (m_a m_b / (m_a + m_b)) ** mass_power."""
    weight = (mass[a] * (mass[b] / divisor(mass[a] + mass[b], mass.dtype))) ** mass_power
    return float(weight * _squared_distances(a, [b], x, mass, size)[0])


def _lowest_of_cycle(a: int, edges: Mapping[int, int]) -> int | None:
    """Lowest item of the cycle of edges through item a; None if a is on no cycle."""
    way = [a]
    while (b := edges.get(way[-1], way[-1])) not in way:
        way.append(b)
    return min(way) if b == a and len(way) > 1 else None


def lowest(priority: Sequence[float] | Mapping[int, float], candidates: list[int], num: int) -> list[int]:
    """The `num` candidates of lowest priority, in ascending order (ties: lowest index)."""
    if num == 0:
        return []
    last = sorted(priority[j] for j in candidates)[num - 1]
    tie = TIE * max(last, 1.0)
    clear = [j for j in candidates if priority[j] < last - tie]
    tied = [j for j in candidates if abs(priority[j] - last) <= tie]
    return sorted(clear + tied[: num - len(clear)])
