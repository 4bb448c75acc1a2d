"""`merge="nearest"` for many heads at once: merging along the shortest nearest-neighbour edges.

Truncated single linkage (`docs/method/math.md`, section 5): some of the items, the *movers*, each search
their nearest item. The shortest of these edges are merged, at first half of the merges that are due. Merged
clusters then search again before the next part. The cost is one matrix product for all movers, a few smaller
ones, and one selection of edges per part. As in routing, float64 decides what a float32 product cannot.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from ovq.ops.options import (
    MASS_POWER,
    NO_DISTANCE,
    NUM_PARTS,
    ORDINARY,
    TIE,
    check_sizes,
    check_value_weight,
)
from ovq.ops.selection import best_two, lowest, padded_to_blocks
from ovq.ops.sums import added_up, divisor, slot_means

# Maximum number of near ties whose distances are computed pair by pair. Beyond it, as with repeated keys, one
# float64 matrix product is cheaper.
_PAIRS = 1 << 15
# When shrinking, an eighth of the slots is merged before all slots search again. If all merges were made at
# once, slots that are already means of many would attract still more (docs/results/memory.md).
_PART = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """The items (slots and tokens) of S streams (row and head), as points (keys, factor * values).

    Attributes:
        keys: `[S, M, K]` mean keys. values: `[S, M, V]` mean values.
        factor: `[S]` float64 factor of the values.
        mass: `[S, M]` weights, or counts without token weights.
        count: `[S, M]` tokens in each item; 0 for unused places.
        mass_power: power of the masses in the priority of edges.
    """

    keys: Tensor
    values: Tensor
    factor: Tensor
    mass: Tensor
    count: Tensor
    mass_power: float = MASS_POWER

    @classmethod
    def of(
        cls,
        keys: Tensor,
        values: Tensor,
        mass: Tensor,
        count: Tensor,
        *,
        value_weight: float,
        mass_power: float = MASS_POWER,
    ) -> Items:
        """The items; the factor is `value_weight` divided by the root mean square length of the values."""
        # Accumulated in float64 without a float64 copy of the values.
        lengths = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).square_()
        weights = mass.double().masked_fill(~lengths.isfinite(), 0)
        total = (weights * lengths.nan_to_num(0, 0, 0)).sum(-1)
        weight = weights.sum(-1)
        power = total / torch.where(weight > 0, weight, 1)
        factor = torch.where((power > 0) & power.isfinite(), value_weight / power.sqrt(), 0)
        return cls(keys=keys, values=values, factor=factor, mass=mass, count=count, mass_power=mass_power)


def movers(num_slots: list[int], num_merged: list[int], chunk_size: int, device: torch.device) -> Tensor:
    """Mask `[S, n + C]` of the movers: all tokens, and up to C slots in rotation.

    Args:
        num_slots: number of slots n of each stream; the mask is for the largest n.
        num_merged: number t of tokens that each stream has merged; the rotation starts at slot t mod n.
        chunk_size: C.
        device: device of the mask.

    Example:
        >>> movers([3, 2], [4, 4], 2, torch.device("cpu")).int().tolist()
        [[0, 1, 1, 1, 1], [1, 1, 0, 1, 1]]
    """
    own, turn = (torch.tensor(x, device=device)[:, None] for x in (num_slots, num_merged))
    index = torch.arange(max(num_slots), device=device)
    is_slot = (index < own) & ((index - turn).remainder(own.clamp(min=1)) < chunk_size)
    return torch.nn.functional.pad(is_slot, (0, chunk_size), value=True)


def nearest_roots(items: Items, is_mover: Tensor, due: list[int]) -> Tensor:
    """Lowest item `[S, M]` of the cluster that each item ends in, after `due[s]` merges in stream s.

    Args:
        items: the items, more than `due[s]` in each stream.
        is_mover: `[S, M]` mask of the movers. Items of zero mass always move, and all clusters do if edges
            run out.
        due: number of merges in each stream.
    """
    index = torch.arange(is_mover.shape[1], device=is_mover.device).expand(is_mover.shape)
    roots, left = index, torch.tensor(due, device=is_mover.device)
    if not any(due):
        return roots
    clusters = _Clusters(items)
    edges = clusters.edges(is_mover)
    for num_parts in itertools.count(1):
        is_none = (edges.target == index) | _is_lowest_of_cycle(edges.target)
        part = (left + 1) // 2 if num_parts < NUM_PARTS else left
        num = torch.minimum(part, (~is_none).sum(-1))
        trees = _lowest_of_tree(torch.where(clusters.shortest(edges, is_none, num), edges.target, index))
        roots, left = trees.gather(1, roots), left - num
        if not bool((left > 0).any()):
            break
        has_joined = clusters.join_(trees)
        # If merges are still due after all parts, all clusters search.
        is_over = num_parts >= NUM_PARTS
        edges = clusters.edges() if is_over else clusters.followed(edges, trees, has_joined)
    return roots


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Edges:
    """The edges of S streams from movers to their nearest items.

    Attributes:
        target: `[S, M]` nearest item; the item itself if it has no edge.
        distance: `[S, M]` float64 squared distance, relative to `_Clusters.size`.
        error: `[S, M]` upper bound of the error of the distance.
    """

    target: Tensor
    distance: Tensor
    error: Tensor


class _Clusters:
    """Clusters of items during merging. A cluster is stored at the place of its lowest item.

    Attributes:
        mass: `[S, M]` float64.
        is_there: `[S, M]` whether there is a cluster at this place.
        size: `[S]` largest squared length of a point of non-zero mass, or 1 if that is 0.
    """

    def __init__(self, items: Items) -> None:
        self._items = items
        self.mass, self.is_there = items.mass.to(torch.float64, copy=True), items.count > 0
        # Means of merged clusters, and the index of the mean of the cluster at each place, or -1.
        dim = items.keys.shape[-1] + items.values.shape[-1]
        self._means = items.keys.new_empty(0, dim, dtype=torch.float64)
        self._place = torch.full_like(items.count, -1)
        # The last search: its items, their scores against all clusters, and their squared lengths.
        self._search: tuple[Tensor, Tensor, Tensor]
        self._lay_out(items.keys.dtype)
        size = self._squares.amax(-1)
        if items.keys.dtype == torch.float32:
            is_ordinary = bool(self._is_point.equal(self._has_mass)) and _are_ordinary(size, items.factor)
            # Squares may be zero though points are not.
            if not is_ordinary or bool(self._x[size == 0, :, :-1].any()):
                self._lay_out(torch.float64)
                size = self._squares.amax(-1)
        self.size = divisor(size, torch.float64)

    @property
    def _has_mass(self) -> Tensor:
        return self.is_there & (self.mass > 0)

    @property
    def _is_point(self) -> Tensor:
        """Mask of the finite points that may be targets."""
        return self._x[:, : self.mass.shape[1], -1] > -torch.inf

    @property
    def _squares(self) -> Tensor:
        return self._x[:, : self.mass.shape[1], -1].mul(-2).masked_fill_(~self._is_point, 0)

    def _lay_out(self, dtype: torch.dtype) -> None:
        """Fill `_x` with rows (x, -|x|^2 / 2); the one nearest to y has the largest product with (y, 1)."""
        items, num = self._items, self.mass.shape[1]
        shape = (len(self.mass), padded_to_blocks(num), self._means.shape[-1] + 1)
        self._x = items.keys.new_empty(shape, dtype=dtype)
        self._x[:, :num, : items.keys.shape[-1]] = items.keys
        values = self._x[:, :num, items.keys.shape[-1] : -1]
        # Not by `out=`, which has no forward-mode derivative.
        values.copy_(items.values).mul_(items.factor.to(dtype)[:, None, None])
        self._x[:, num:, :-1], self._x[:, num:, -1] = 0, -torch.inf
        s, a = (self._place >= 0).nonzero(as_tuple=True)
        self._x[s, a, :-1] = self._means[self._place[s, a]].to(dtype)
        self._end_rows(self._x[:, :num], self._has_mass)

    @staticmethod
    def _end_rows(x: Tensor, is_target: Tensor) -> None:
        """Write -|x|^2 / 2 at the end of rows `[..., D + 1]`; -inf for non-targets and non-finite points."""
        squares = torch.linalg.vector_norm(x[..., :-1], dim=-1).square_()
        is_point = is_target & squares.isfinite()
        if not bool(is_point.all()):
            # Non-finite entries would make products with other rows NaN.
            x.masked_fill_(~is_point[..., None], 0)
        x[..., -1] = torch.where(is_point, squares / -2, -torch.inf)

    def _point(self, s: Tensor, a: Tensor) -> Tensor:
        """Points `[P, K + V]` in float64 at places a of streams s."""
        items, place = self._items, self._place[s, a]
        values = items.values[s, a].double() * items.factor[s, None]
        points = torch.cat([items.keys[s, a].double(), values], -1)
        has_joined = (place >= 0).nonzero()[:, 0]
        return points.index_copy_(0, has_joined, self._means[place[has_joined]])

    def _distances(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Squared distances `[P]` between a and b, relative to `size`, in float64 from differences."""
        distance = (self._point(s, a) - self._point(s, b)).square_().sum(-1) / self.size[s]
        return distance.masked_fill_(~distance.isfinite(), NO_DISTANCE)

    def _found_distances(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`_distances` to clusters b that have just searched, from the products of a float32 search."""
        # If all merged clusters have zero mass, none has searched, but then no edge has followed one either.
        if self._x.dtype == torch.float64 or not len(s):
            return self._distances(s, a, b)
        order, scores, squares = self._search
        row = torch.zeros_like(self._place)
        row.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand(order.shape))
        row = row[s, b]
        distance = (squares[s, row] - 2 * scores[s, row, a]).double() / self.size[s]
        return distance.masked_fill_(~distance.isfinite(), NO_DISTANCE)

    @property
    def _error(self) -> float:
        """Upper bound of the error of distances from `_x`: rounding of the product and of the points."""
        if self._x.dtype == torch.float64:
            return 0.0
        return 4 * (self._means.shape[-1] + 8) * torch.finfo(torch.float32).eps

    def join_(self, trees: Tensor) -> Tensor:
        """Merge clusters with the same root in `trees` `[S, M]`. Returns a mask `[S, M]` of merged roots."""
        s, a = (trees != torch.arange(trees.shape[1], device=trees.device)).nonzero(as_tuple=True)
        has_joined = torch.zeros_like(self.is_there)
        has_joined[s, trees[s, a]] = True
        stream, root = has_joined.nonzero(as_tuple=True)
        place = torch.full_like(self._place, -1)
        place[stream, root] = torch.arange(len(root), device=trees.device)
        into, mass, total = place[s, trees[s, a]], self.mass[s, a], self.mass[stream, root]
        sums = total[:, None] * self._point(stream, root)
        sums.index_add_(0, into, mass[:, None] * self._point(s, a))
        total = total.index_add(0, into, mass)
        means = sums / divisor(total, total.dtype)[:, None]
        self._place[stream, root] = len(self._means) + place[stream, root]
        self._means = torch.cat([self._means, means])
        self.mass[stream, root], self.mass[s, a], self.is_there[s, a] = total, 0.0, False
        rows = torch.nn.functional.pad(means, (0, 1)).to(self._x.dtype)
        self._end_rows(rows, total > 0)
        self._x[stream, root] = rows
        self._x[s, a, -1] = -torch.inf
        return has_joined

    def edges(self, is_mover: Tensor | None = None) -> _Edges:
        """Edges from movers `[S, M]` (default: all) and clusters of zero mass to their nearest clusters."""
        has_mass = self._has_mass
        is_mover = has_mass if is_mover is None else has_mass & is_mover
        # Clusters of zero mass are no targets, unless all have zero mass.
        is_target = torch.where(has_mass.any(-1, keepdim=True), has_mass, self.is_there)
        # A cluster of zero mass is at distance 0 from every other, so it goes to the first target without a
        # search. So does a non-finite one, and one without a finite target, at distance `NO_DISTANCE`.
        first = is_target.byte().argmax(-1, keepdim=True)
        second = is_target.scatter(1, first, False).byte().argmax(-1, keepdim=True)
        index = torch.arange(is_mover.shape[1], device=is_mover.device).expand(is_mover.shape)
        target = torch.where(index == first, second, first)
        distance, error = torch.full_like(self.mass, NO_DISTANCE), torch.zeros_like(self.mass)
        if bool(is_mover.any()):
            order = (~is_mover).byte().argsort(dim=-1, stable=True)[:, : int(is_mover.sum(-1).max())]
            is_found, *near = self._nearest(order)
            is_found &= is_mover.gather(1, order)
            for of_items, found in zip((target, distance, error), near, strict=True):
                of_items.scatter_(1, order, torch.where(is_found, found, of_items.gather(1, order)))
        has_edge = is_target.sum(-1, keepdim=True) > is_target.long()
        has_edge &= is_mover | (self.is_there & ~has_mass)
        return _Edges(target=torch.where(has_edge, target, index), distance=distance, error=error)

    def followed(self, edges: _Edges, trees: Tensor, has_joined: Tensor) -> _Edges:
        """Edges after `join_(trees)`: merged clusters search again, other edges follow their targets."""
        again, index = self.edges(has_joined), torch.arange(trees.shape[1], device=trees.device)
        target = torch.where(self.is_there, trees.gather(1, edges.target), index)
        distance, error = edges.distance.clone(), edges.error.clone()
        is_moved = (target != index) & self._has_mass & has_joined.gather(1, target)
        s, a = is_moved.nonzero(as_tuple=True)
        distance[s, a], error[s, a] = self._found_distances(s, a, target[s, a]), self._error
        return _Edges(
            target=torch.where(has_joined, again.target, target),
            distance=torch.where(has_joined, again.distance, distance),
            error=torch.where(has_joined, again.error, error),
        )

    def shortest(self, edges: _Edges, is_none: Tensor, num: Tensor) -> Tensor:
        """Mask `[S, M]` of the `num` `[S]` edges of lowest priority (distance times a power of both masses).

        Args:
            edges: the edges. is_none: `[S, M]` mask of edges to skip. num: `[S]`.
        """
        mass, other = self.mass, self.mass.gather(1, edges.target)
        weight = (mass * (other / divisor(mass + other, mass.dtype))) ** self._items.mass_power
        priority, error = (edges.distance * weight).masked_fill_(is_none, torch.inf), edges.error * weight
        most, last = int(num.max()), (num - 1).clamp(min=0)[:, None]
        # Only edges whose error bounds reach the selection boundary need an exact priority.
        low, high = priority - error, priority + error
        first, end = (x.topk(most, largest=False).values.gather(1, last) for x in (low, high))
        is_near = (error > 0) & (high >= first) & (low <= end) & ~is_none
        s, a = is_near.nonzero(as_tuple=True)
        priority[s, a] = self._distances(s, a, edges.target[s, a]) * weight[s, a]
        return lowest(priority, num, most)

    def _nearest(self, order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Nearest cluster of each of `order` `[S, A]`, by a float32 product where its precision suffices.

        Returns:
            Whether a finite nearest cluster exists; its index (ties: lowest); its distance and error, as in
            `_Edges`.
        """
        num, size = self.mass.shape[1], self.size[:, None]
        rows = _rows(self._x, order)
        is_point = rows[..., -1] > -torch.inf
        squares = rows[..., -1] * -2
        rows[..., -1] = 1
        # `data`, because selective checkpoints keep products, and refuse changed ones. If they give this one
        # again, the same change changes nothing.
        scores = torch.bmm(rows, self._x.transpose(1, 2)).data.scatter_(2, order[..., None], -torch.inf)
        self._search = order, scores, squares
        if self._x.dtype == torch.float64:
            best = scores.amax(-1)
            place = (scores >= (best - TIE / 2 * size)[..., None]).byte().argmax(-1)
            is_found = is_point & (best > -torch.inf)
            s, t = is_found.nonzero(as_tuple=True)
            distance = torch.zeros_like(best)
            distance[s, t] = self._distances(s, order[s, t], place[s, t])
            return is_found, place, distance, torch.zeros_like(best)
        place, best, second = best_two(scores)
        # Covers the errors of both compared scores, which differ by half as much as distances.
        tolerance = ((self._error / 2 + 2 * TIE) * size).float()
        s, t = (best - second <= tolerance).nonzero(as_tuple=True)
        is_candidate = scores[s, t, :num] >= (best - tolerance)[s, t, None]
        if int(is_candidate.sum()) > _PAIRS:
            self._lay_out(torch.float64)
            return self._nearest(order)
        row, item = is_candidate.nonzero(as_tuple=True)
        exact = self._distances(s[row], order[s, t][row], item)
        limit = exact.new_full(s.shape, torch.inf).scatter_reduce_(0, row, exact, "amin")
        is_tied = exact <= (limit + TIE)[row]
        place[s, t] = place[s, t].fill_(num).scatter_reduce_(0, row[is_tied], item[is_tied], "amin")
        distance = (squares - 2 * best).double() / size
        error = torch.full_like(distance, self._error)
        return is_point & (best > -torch.inf), place, distance, error


def _are_ordinary(size: Tensor, factor: Tensor) -> bool:
    """Whether float32 products of points of this size, and values times `factor`, stay in range."""
    shortest, longest = (length**2 for length in ORDINARY)
    is_ordinary = torch.ones_like(size, dtype=torch.bool)
    for x in (size, factor):
        is_ordinary &= (x == 0) | ((x >= shortest) & (x <= longest))
    return bool(is_ordinary.all())


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[S, A, D]` of `x` `[S, M, D]` at `index` `[S, A]`."""
    first = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, (first + index).flatten()).view(*index.shape, x.shape[-1])


def _is_lowest_of_cycle(target: Tensor) -> Tensor:
    """Mask `[S, M]` of the items that are the lowest of a cycle of `target`."""
    index = torch.arange(target.shape[1], device=target.device).expand(target.shape)
    # Pointer doubling: the item 1, 2, 4, ... steps ahead, and the lowest item on the way.
    ahead, least = target, torch.minimum(index, target)
    for _ in range(target.shape[1].bit_length()):
        least, before = torch.minimum(least, least.gather(1, ahead)), ahead
        ahead = ahead.gather(1, ahead)
        # All have reached cycles whose lengths divide the step, mostly mutual nearest pairs.
        if torch.equal(ahead, before):
            break
    is_on_cycle = torch.zeros_like(target, dtype=torch.bool).scatter_(1, ahead, True)
    return is_on_cycle & (least == index)


def _lowest_of_tree(parent: Tensor) -> Tensor:
    """Lowest item `[S, M]` of the tree of each item, given the parent of each item (roots: themselves)."""
    root = parent
    while not torch.equal(above := root.gather(1, root), root):
        root = above
    index = torch.arange(parent.shape[1], device=parent.device).expand(parent.shape)
    return index.scatter_reduce(1, root, index, "amin").gather(1, root)


def shrunk(slots: dict[str, Tensor], num_slots: int, *, value_weight: float) -> dict[str, Tensor]:
    """Tensors of the slots of a state (by name), merged until at most `num_slots` per head are left."""
    check_sizes(1, num_slots=num_slots)
    check_value_weight("value_weight", value_weight)
    while slots["count"].shape[2] > num_slots:
        num_open = (slots["count"][:, 0] > 0).sum(-1).tolist()
        due = [min(max(0, n - num_slots), max(1, n // _PART)) for n in num_open]
        # Room for `num_slots` slots, or for as many as are left.
        capacity = max([num_slots, *(n - merges for n, merges in zip(num_open, due, strict=True))])
        slots = _merged(slots, due, capacity, value_weight)
    return slots


def _merged(
    slots: dict[str, Tensor], due: list[int], capacity: int, value_weight: float
) -> dict[str, Tensor]:
    """`slots` after `due[r]` merges in each head of row r, with `capacity` slots allocated."""
    rows, heads = slots["count"].shape[:2]
    streams = {name: x.flatten(0, 1) for name, x in slots.items()}
    count = streams["count"]
    with torch.no_grad():
        mass = streams.get("weight", count)
        keys, values = (slot_means(streams[name], mass) for name in ("key_sum", "value_sum"))
        items = Items.of(keys, values, mass, count, value_weight=value_weight)
        roots = nearest_roots(items, count > 0, [merges for merges in due for _ in range(heads)])
    is_kept = (roots == torch.arange(count.shape[1], device=count.device)) & (count > 0)
    # Spare slots are zero, so adding them to the last kept slot changes nothing.
    place = (is_kept.cumsum(-1) - 1).clamp(min=0).gather(1, roots)
    totals = {name: added_up(parts, place, capacity) for name, parts in streams.items()}
    return {name: total.unflatten(0, (rows, heads)) for name, total in totals.items()}
