"""merge="nearest" for many heads at once: the shortest edges from items to their nearest ones, all at once.

One step of single linkage, cut off when enough is merged (`docs/math.md`, section 5): some of the items, the
*movers*, each look for the item nearest to them, and the shortest of these edges are taken. That is one
matrix product, one maximum per mover and one selection of edges. As in routing, what a float32 product cannot
tell apart is decided again in float64.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ovq.ops.options import NO_DISTANCE, ORDINARY, TIE
from ovq.ops.selection import best_two, lowest, padded_to_blocks
from ovq.ops.state import divisor
from ovq.ops.ward import value_factor

# Most pairs of items whose distances are computed one by one. Where there are more, as with repeated keys,
# one float64 matrix product is cheaper.
_PAIRS = 1 << 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """The slots and tokens of S streams, as points (keys, factor * values).

    Attributes:
        keys: `[S, M, K]` mean keys. values: `[S, M, V]` mean values.
        factor: `[S]` float64.
        mass: `[S, M]` weights, or counts where tokens have none.
        count: `[S, M]` tokens in each item; 0 for one that is not there.
    """

    keys: Tensor
    values: Tensor
    factor: Tensor
    mass: Tensor
    count: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, mass: Tensor, count: Tensor, value_weight: float) -> Items:
        """The items, with values scaled as `value_weight` says."""
        # In float64, without a copy of all values in it.
        lengths = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).square_()
        factor = value_factor(lengths, mass, value_weight)
        return cls(keys=keys, values=values, factor=factor, mass=mass, count=count)

    @property
    def points(self) -> Tensor:
        """`[S, M, K + V]` float64."""
        return torch.cat([self.keys.double(), self.values.double() * self.factor[:, None, None]], -1)

    def distances(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Squared distances in float64 of items a and b of streams s, from differences, of their shape."""
        keys = self.keys[s, a].double() - self.keys[s, b].double()
        values = self.values[s, a].double() - self.values[s, b].double()
        return keys.square_().sum(-1) + self.factor[s].square() * values.square_().sum(-1)

    def merged(self, roots: Tensor) -> Items:
        """Clusters, each in the place of its root `[S, M]`: means by mass, masses and counts."""
        points, mass = self.points, self.mass.double()
        total, count = (torch.zeros_like(x).scatter_add_(1, roots, x) for x in (mass, self.count))
        index = roots[..., None].expand_as(points)
        means = torch.zeros_like(points).scatter_add_(1, index, mass[..., None] * points)
        means /= divisor(total, total.dtype)[..., None]
        factor = torch.ones_like(self.factor)
        return Items(keys=means, values=means[..., :0], factor=factor, mass=total, count=count)


def movers(num_slots: list[int], num_merged: list[int], chunk_size: int, device: torch.device) -> Tensor:
    """Mask `[S, n + C]` of the items that look for another: the tokens, and as many slots in turn.

    Args:
        num_slots: slots of each stream; n is the largest of these numbers.
        num_merged: tokens that each stream has merged so far, from which follows whose turn it is.
        chunk_size: C.
        device: of the mask.

    Example:
        >>> movers([3, 2], [4, 4], 2, torch.device("cpu")).int().tolist()
        [[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]]
    """
    own, turn = (torch.tensor(x, device=device)[:, None] for x in (num_slots, num_merged))
    index = torch.arange(max(num_slots), device=device)
    is_slot = (index < own) & ((index - turn).remainder(own.clamp(min=1)) < chunk_size)
    return torch.nn.functional.pad(is_slot, (0, chunk_size), value=True)


def nearest_roots(items: Items, is_mover: Tensor, due: list[int]) -> Tensor:
    """For each item, the lowest item `[S, M]` of the cluster it ends in, after `due[s]` merges in stream s.

    Args:
        items: the items, more than `due[s]` in each stream.
        is_mover: `[S, M]` which of them look for another; what weighs nothing does in any case, and where the
            edges are too few, so do all clusters.
        due: how many merges to make in each stream.
    """
    most, left = max(due, default=0), torch.tensor(due, device=is_mover.device)
    index = torch.arange(is_mover.shape[1], device=is_mover.device).expand(is_mover.shape)
    roots = index
    while bool((left > 0).any()):
        edges = _edges(items, is_mover)
        edges.priority.masked_fill_(_is_lowest_of_circle(edges.target), torch.inf)
        num = torch.minimum(left, edges.priority.isfinite().sum(-1))
        edges.refine_(items, num, most)
        trees = _lowest_of_tree(torch.where(lowest(edges.priority, num, most), edges.target, index))
        roots, left = trees.gather(1, roots), left - num
        if bool((left > 0).any()):
            items = items.merged(trees)
            is_mover = items.count > 0
    return roots


@dataclasses.dataclass(frozen=True)
class _Edges:
    """The edges of S streams from movers to their nearest items.

    Attributes:
        target: `[S, M]` the nearest item; an item itself where it has no edge.
        priority: `[S, M]` float64, the lowest are taken first; inf where there is no edge.
        factor: `[S, M]` what a squared distance is multiplied by to give it.
        error: the most by which priorities are wrong.
    """

    target: Tensor
    priority: Tensor
    factor: Tensor
    error: float

    def refine_(self, items: Items, num: Tensor, most: int) -> None:
        """Let priorities be exact where that may decide which are the `num` `[S]` lowest; at most `most`."""
        if not self.error:
            return
        ranked = self.priority.topk(most, largest=False).values
        limit = ranked.gather(1, (num - 1).clamp(min=0)[:, None])
        # A factor of 0 is of an item that weighs nothing, and may be no point.
        is_near = ((self.priority - limit).abs() <= 2 * self.error) & (self.factor > 0)
        s, a = is_near.nonzero(as_tuple=True)
        self.priority[s, a] = items.distances(s, a, self.target[s, a]) * self.factor[s, a]


def _edges(items: Items, is_mover: Tensor) -> _Edges:
    """The edges from movers, and from all that weighs nothing, to the items nearest to them."""
    is_there, mass = items.count > 0, items.mass.double()
    has_mass = is_there & (mass > 0)
    # What weighs nothing is no target, unless nothing weighs anything.
    is_target = torch.where(has_mass.any(-1, keepdim=True), has_mass, is_there)
    # It is at no distance from any other, so it goes to the first that there is, without a search.
    is_searching = is_mover & has_mass
    order = (~is_searching).byte().argsort(dim=-1, stable=True)[:, : int(is_searching.sum(-1).max())]
    near = _near(items, order, has_mass)
    first = is_target.byte().argmax(-1, keepdim=True)
    second = is_target.scatter(1, first, False).byte().argmax(-1, keepdim=True)
    index = torch.arange(is_mover.shape[1], device=order.device).expand(is_mover.shape)
    # So does what is not finite, or finds nothing else that is.
    target = torch.where(index == first, second, first)
    target.scatter_(1, order, torch.where(near.is_found, near.target, target.gather(1, order)))
    distance = torch.full_like(mass, NO_DISTANCE)
    distance.scatter_(1, order, torch.where(near.is_found, near.distance, NO_DISTANCE))
    # What weighs less than a token costs as much less.
    weight = mass.clamp(max=1)
    has_edge = is_target.sum(-1, keepdim=True) > is_target.long()
    has_edge &= is_searching | (is_there & ~has_mass)
    return _Edges(
        target=torch.where(has_edge, target, index),
        priority=(distance * weight).masked_fill_(~has_edge, torch.inf),
        factor=weight / near.size[:, None],
        error=near.error,
    )


@dataclasses.dataclass(frozen=True)
class _Near:
    """The point nearest to each of some items, of equally near ones the first.

    Attributes:
        target: `[S, A]` the point.
        is_found: `[S, A]` whether the item is a point, and there is another.
        distance: `[S, A]` float64 squared distance, relative to `size`.
        size: `[S]` the largest squared length of a point, or 1 if that is 0.
        error: the most by which distances are wrong.
    """

    target: Tensor
    is_found: Tensor
    distance: Tensor
    size: Tensor
    error: float


def _near(items: Items, order: Tensor, has_mass: Tensor) -> _Near:
    """What is nearest to the items `order` `[S, A]`, by a product in float32 where that can tell.

    Points are the items of some mass that are finite.
    """
    if items.keys.dtype != torch.float32:
        return _exactly_near(items, order, has_mass)
    streams, num_items, dim = *items.keys.shape[:2], items.keys.shape[-1] + items.values.shape[-1]
    # x_a.x_b - |x_b|^2 / 2, which is highest for the nearest, as one product: (x_a, 1).(x_b, -|x_b|^2 / 2).
    values = items.values * items.factor.float()[:, None, None]
    points = torch.cat([items.keys, values, values.new_empty(streams, num_items, 1)], -1)
    x = points[..., :dim]
    if not bool(has_mass.all()):
        x.masked_fill_(~has_mass[..., None], 0)
    squares = torch.linalg.vector_norm(x, dim=-1).square_()
    size = squares.amax(-1)
    if not _are_ordinary(size, items.factor):
        return _exactly_near(items, order, has_mass)
    points[..., dim] = torch.where(has_mass, squares / -2, -torch.inf)
    if missing := padded_to_blocks(num_items) - num_items:
        points = torch.nn.functional.pad(points, (0, 0, 0, missing))
        points[:, num_items:, dim] = -torch.inf
    rows = _rows(points, order)
    rows[..., dim] = 1
    scores = torch.bmm(rows, points.transpose(1, 2))
    scores.scatter_(2, order[..., None], -torch.inf)
    place, best, second = best_two(scores)
    # Rounding of such a product, and of what it is of, on both sides of a comparison.
    eps = torch.finfo(torch.float32).eps
    tolerance = (2 * (dim + 8) * eps + 2 * TIE) * size[:, None]
    is_contested = best - second <= tolerance
    if bool(is_contested.any()):
        s, t = is_contested.nonzero(as_tuple=True)
        is_candidate = scores[s, t, :num_items] >= (best - tolerance)[s, t, None]
        if int(is_candidate.sum()) > _PAIRS:
            return _exactly_near(items, order, has_mass)
        row, item = is_candidate.nonzero(as_tuple=True)
        distance = items.distances(s[row], order[s, t][row], item)
        limit = distance.new_full(s.shape, torch.inf).scatter_reduce_(0, row, distance, "amin")
        is_tied = distance <= (limit + TIE * size[s])[row]
        place[s, t] = place[s, t].fill_(num_items).scatter_reduce_(0, row[is_tied], item[is_tied], "amin")
    size = divisor(size, torch.float64)
    distance = (squares.gather(1, order) - 2 * best) / size[:, None]
    is_found = has_mass.gather(1, order) & (best > -torch.inf)
    return _Near(place, is_found, distance, size, 4 * (dim + 8) * eps)


def _exactly_near(items: Items, order: Tensor, has_mass: Tensor) -> _Near:
    """The same, in float64 throughout."""
    points = items.points
    squares = points.square().sum(-1)
    is_point = has_mass & squares.isfinite()
    size = squares.masked_fill(~is_point, 0).amax(-1)
    points.masked_fill_(~is_point[..., None], 0)
    half = (squares / 2).masked_fill(~is_point, torch.inf)
    scores = torch.baddbmm(half[:, None], _rows(points, order), points.transpose(1, 2), beta=-1)
    scores.scatter_(2, order[..., None], -torch.inf)
    best = scores.amax(-1)
    floor = best - TIE / 2 * size[:, None]
    place = (scores >= floor[..., None]).byte().argmax(-1)
    size = divisor(size, torch.float64)
    stream = torch.arange(len(order), device=order.device)[:, None]
    distance = items.distances(stream, order, place) / size[:, None]
    return _Near(place, is_point.gather(1, order) & (best > -torch.inf), distance, size, 0.0)


def _are_ordinary(size: Tensor, factor: Tensor) -> bool:
    """Whether float32 products of points of that size neither vanish nor overflow, nor values times that."""
    shortest, longest = (length**2 for length in ORDINARY)
    is_ordinary = torch.ones_like(size, dtype=torch.bool)
    for x in (size, factor):
        is_ordinary &= (x == 0) | ((x >= shortest) & (x <= longest))
    return bool(is_ordinary.all())


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[S, A, D]` of `x` `[S, M, D]`, those of an index `[S, A]`."""
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, (first + index).flatten()).view(*index.shape, x.shape[-1])


def _is_lowest_of_circle(target: Tensor) -> Tensor:
    """Which items `[S, M]` are the lowest of those that one comes back to on the way along targets."""
    index = torch.arange(target.shape[1], device=target.device).expand(target.shape)
    # Where 1, 2, 4, ... steps lead, and the lowest item on the way.
    ahead, least = target, torch.minimum(index, target)
    for _ in range(target.shape[1].bit_length()):
        least, ahead = torch.minimum(least, least.gather(1, ahead)), ahead.gather(1, ahead)
    is_on_circle = torch.zeros_like(target, dtype=torch.bool).scatter_(1, ahead, True)
    return is_on_circle & (least == index)


def _lowest_of_tree(parent: Tensor) -> Tensor:
    """For each item, the lowest `[S, M]` of all that end in the same one on the way along parents."""
    root = parent
    while not torch.equal(above := root.gather(1, root), root):
        root = above
    index = torch.arange(parent.shape[1], device=parent.device).expand(parent.shape)
    return index.scatter_reduce(1, root, index, "amin").gather(1, root)
