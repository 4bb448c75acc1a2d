"""merge="nearest" for many heads at once: the shortest edges from items to their nearest ones, in parts.

Single linkage, cut off when enough is merged (`docs/method/math.md`, section 5): some of the items, the
*movers*, each look for the item nearest to them, and the shortest of these edges are taken, half of
what is due at first. What they have joined looks again before the next ones are taken. That is a matrix
product with all movers, a few small ones, and as many selections of edges. As in routing, what a float32
product cannot tell apart is decided again in float64.
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

# Most pairs of items whose distances are computed one by one. Where there are more, as with repeated keys,
# one float64 matrix product is cheaper.
_PAIRS = 1 << 15
# One in so many slots is merged before all look for their nearest again. Where all that is due is merged at
# once, slots that have become means of many attract still more (docs/results/memory.md).
_PART = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """The slots and tokens of S streams, as points (keys, factor * values).

    Attributes:
        keys: `[S, M, K]` mean keys. values: `[S, M, V]` mean values.
        factor: `[S]` float64.
        mass: `[S, M]` weights, or counts where tokens have none.
        count: `[S, M]` tokens in each item; 0 for one that is not there.
        mass_power: the power of masses in what edges are ranked by.
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
        """The items, with values scaled as `value_weight` says."""
        # In float64, without a copy of all values in it.
        lengths = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).square_()
        factor = _value_factor(lengths, mass, value_weight)
        return cls(keys=keys, values=values, factor=factor, mass=mass, count=count, mass_power=mass_power)

    def points(self, index: tuple[Tensor, Tensor] | slice = slice(None)) -> Tensor:
        """`[S, M, K + V]` float64, or those of an index `(stream, item)`."""
        factor = self.factor[:, None] if isinstance(index, slice) else self.factor[index[0]]
        return torch.cat([self.keys[index].double(), self.values[index].double() * factor[..., None]], -1)


def _value_factor(lengths: Tensor, mass: Tensor, value_weight: float) -> Tensor:
    """What values are scaled by, `[S]` float64: w over the root of their mean squared length.

    Args:
        lengths: `[S, M]` squared lengths in float64.
        mass: `[S, M]` counts or weights, 0 for an item that is not there.
        value_weight: w.
    """
    weights = mass.double().masked_fill(~lengths.isfinite(), 0)
    total = (weights * lengths.nan_to_num(0, 0, 0)).sum(-1)
    weight = weights.sum(-1)
    power = total / torch.where(weight > 0, weight, 1)
    return torch.where((power > 0) & power.isfinite(), value_weight / power.sqrt(), 0)


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
    index = torch.arange(is_mover.shape[1], device=is_mover.device).expand(is_mover.shape)
    roots, left = index, torch.tensor(due, device=is_mover.device)
    if not any(due):
        return roots
    clusters = _Clusters(items)
    edges = clusters.edges(is_mover)
    for num_parts in itertools.count(1):
        is_none = (edges.target == index) | _is_lowest_of_circle(edges.target)
        part = (left + 1) // 2 if num_parts < NUM_PARTS else left
        num = torch.minimum(part, (~is_none).sum(-1))
        trees = _lowest_of_tree(torch.where(clusters.shortest(edges, is_none, num), edges.target, index))
        roots, left = trees.gather(1, roots), left - num
        if not bool((left > 0).any()):
            break
        has_joined = clusters.join_(trees)
        # Where edges are too few for all parts, all clusters look for another.
        is_over = num_parts >= NUM_PARTS
        edges = clusters.edges() if is_over else clusters.followed(edges, trees, has_joined)
    return roots


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Edges:
    """The edges of S streams from movers to their nearest items.

    Attributes:
        target: `[S, M]` the nearest item; an item itself where it has no edge.
        distance: `[S, M]` float64 squared distance, relative to `_Clusters.size`.
        error: `[S, M]` the most by which distances are wrong.
    """

    target: Tensor
    distance: Tensor
    error: Tensor


class _Clusters:
    """Items that are being joined. A cluster stands in the place of its lowest item.

    Attributes:
        mass: `[S, M]` float64.
        is_there: `[S, M]` whether there is a cluster in this place.
        size: `[S]` the largest squared length of a point that weighs something, or 1 if that is 0.
    """

    def __init__(self, items: Items) -> None:
        self._items = items
        self.mass, self.is_there = items.mass.to(torch.float64, copy=True), items.count > 0
        # The means of what was joined, and which of them stands in a place, or -1.
        dim = items.keys.shape[-1] + items.values.shape[-1]
        self._means = items.keys.new_empty(0, dim, dtype=torch.float64)
        self._place = torch.full_like(items.count, -1)
        # The last search: its items, their scores with all, and their squared lengths.
        self._search: tuple[Tensor, Tensor, Tensor]
        self._lay_out(items.keys.dtype)
        size = self._squares.amax(-1)
        if items.keys.dtype == torch.float32:
            is_ordinary = bool(self._is_point.equal(self._has_mass)) and _are_ordinary(size, items.factor)
            if not is_ordinary:
                self._lay_out(torch.float64)
                size = self._squares.amax(-1)
        self.size = divisor(size, torch.float64)

    @property
    def _has_mass(self) -> Tensor:
        return self.is_there & (self.mass > 0)

    @property
    def _is_point(self) -> Tensor:
        """What others may look for, where they are finite."""
        return self._x[:, : self.mass.shape[1], -1] > -torch.inf

    @property
    def _squares(self) -> Tensor:
        return self._x[:, : self.mass.shape[1], -1].mul(-2).masked_fill_(~self._is_point, 0)

    def _lay_out(self, dtype: torch.dtype) -> None:
        """Let `_x` be rows (x, -|x|^2 / 2), whose product with (y, 1) is highest for the x nearest to y."""
        items, num = self._items, self.mass.shape[1]
        shape = (len(self.mass), padded_to_blocks(num), self._means.shape[-1] + 1)
        self._x = items.keys.new_empty(shape, dtype=dtype)
        self._x[:, :num, : items.keys.shape[-1]] = items.keys
        values = self._x[:, :num, items.keys.shape[-1] : -1]
        torch.mul(items.values, items.factor.to(dtype)[:, None, None], out=values)
        self._x[:, num:, :-1], self._x[:, num:, -1] = 0, -torch.inf
        s, a = (self._place >= 0).nonzero(as_tuple=True)
        self._x[s, a, :-1] = self._means[self._place[s, a]].to(dtype)
        self._end_rows(self._x[:, :num], self._has_mass)

    @staticmethod
    def _end_rows(x: Tensor, is_target: Tensor) -> None:
        """Write what rows `[..., D + 1]` end in; what is no target or no point is infinitely far from all."""
        squares = torch.linalg.vector_norm(x[..., :-1], dim=-1).square_()
        is_point = is_target & squares.isfinite()
        if not bool(is_point.all()):
            # Zero times what is not finite would reach others.
            x.masked_fill_(~is_point[..., None], 0)
        x[..., -1] = torch.where(is_point, squares / -2, -torch.inf)

    def _point(self, s: Tensor, a: Tensor) -> Tensor:
        """Points `[P, K + V]` in float64 in the places a of streams s."""
        points, place = self._items.points((s, a)), self._place[s, a]
        has_joined = (place >= 0).nonzero()[:, 0]
        return points.index_copy_(0, has_joined, self._means[place[has_joined]])

    def _distances(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Squared distances `[P]`, relative to `size`, in float64 from differences."""
        distance = (self._point(s, a) - self._point(s, b)).square_().sum(-1) / self.size[s]
        return distance.masked_fill_(~distance.isfinite(), NO_DISTANCE)

    def _found_distances(self, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The same to items b that have just searched, from products of their search where these will do."""
        # None did if nothing that has joined weighs anything, but then nothing has followed it either.
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
        """The most by which distances are wrong that come from `_x`: rounding of it, and of what it is of."""
        if self._x.dtype == torch.float64:
            return 0.0
        return 4 * (self._means.shape[-1] + 8) * torch.finfo(torch.float32).eps

    def join_(self, trees: Tensor) -> Tensor:
        """Join what has the same root in `trees` `[S, M]`. Returns the roots of more than one, `[S, M]`."""
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
        """The edges of movers `[S, M]`, by default all, and of what weighs nothing, to what is nearest."""
        has_mass = self._has_mass
        is_mover = has_mass if is_mover is None else has_mass & is_mover
        # What weighs nothing is no target, unless nothing weighs anything.
        is_target = torch.where(has_mass.any(-1, keepdim=True), has_mass, self.is_there)
        # It is at no distance from any other, so it goes to the first that there is, without a search. So
        # does what is not finite, or finds nothing else that is: that is further away than anything.
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
        """Edges after `join_(trees)`: what has joined looks again, others keep to where their targets are."""
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
        """Mask `[S, M]` of the `num` `[S]` edges of lowest priority: distances weighed by the masses of both.

        Args:
            edges: the edges. is_none: `[S, M]` those that are not to be taken. num: `[S]`.
        """
        mass, other = self.mass, self.mass.gather(1, edges.target)
        weight = (mass * (other / divisor(mass + other, mass.dtype))) ** self._items.mass_power
        priority, error = (edges.distance * weight).masked_fill_(is_none, torch.inf), edges.error * weight
        most, last = int(num.max()), (num - 1).clamp(min=0)[:, None]
        # What is certain to come before or after the last one that is taken need not be exact.
        low, high = priority - error, priority + error
        first, end = (x.topk(most, largest=False).values.gather(1, last) for x in (low, high))
        is_near = (error > 0) & (high >= first) & (low <= end) & ~is_none
        s, a = is_near.nonzero(as_tuple=True)
        priority[s, a] = self._distances(s, a, edges.target[s, a]) * weight[s, a]
        return lowest(priority, num, most)

    def _nearest(self, order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is nearest to the items `order` `[S, A]`, by a product in float32 where that can tell.

        Returns:
            Whether an item is a point, and there is another; of these the nearest, of equally near ones the
            first; its distance, and error, as in `_Edges`.
        """
        num, size = self.mass.shape[1], self.size[:, None]
        rows = _rows(self._x, order)
        is_point = rows[..., -1] > -torch.inf
        squares = rows[..., -1] * -2
        rows[..., -1] = 1
        scores = torch.bmm(rows, self._x.transpose(1, 2)).scatter_(2, order[..., None], -torch.inf)
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
        # On both sides of a comparison, of half the distances.
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
        least, before = torch.minimum(least, least.gather(1, ahead)), ahead
        ahead = ahead.gather(1, ahead)
        # All are on circles, mostly of two items that are nearest to each other, and back where they were.
        if torch.equal(ahead, before):
            break
    is_on_circle = torch.zeros_like(target, dtype=torch.bool).scatter_(1, ahead, True)
    return is_on_circle & (least == index)


def _lowest_of_tree(parent: Tensor) -> Tensor:
    """For each item, the lowest `[S, M]` of all that end in the same one on the way along parents."""
    root = parent
    while not torch.equal(above := root.gather(1, root), root):
        root = above
    index = torch.arange(parent.shape[1], device=parent.device).expand(parent.shape)
    return index.scatter_reduce(1, root, index, "amin").gather(1, root)


def shrunk(slots: dict[str, Tensor], num_slots: int, *, value_weight: float) -> dict[str, Tensor]:
    """The slots of a state (by name), merged until at most `num_slots` per head are left."""
    check_sizes(1, num_slots=num_slots)
    check_value_weight("value_weight", value_weight)
    while slots["count"].shape[2] > num_slots:
        num_open = (slots["count"][:, 0] > 0).sum(-1).tolist()
        due = [min(max(0, n - num_slots), max(1, n // _PART)) for n in num_open]
        # Room for as many slots as are wanted, or for those that are left.
        capacity = max([num_slots, *(n - merges for n, merges in zip(num_open, due, strict=True))])
        slots = _merged(slots, due, capacity, value_weight)
    return slots


def _merged(
    slots: dict[str, Tensor], due: list[int], capacity: int, value_weight: float
) -> dict[str, Tensor]:
    """`slots` after `due[r]` merges in each head of row r, with room for `capacity`."""
    rows, heads = slots["count"].shape[:2]
    streams = {name: x.flatten(0, 1) for name, x in slots.items()}
    count = streams["count"]
    with torch.no_grad():
        mass = streams.get("weight", count)
        keys, values = (slot_means(streams[name], mass) for name in ("key_sum", "value_sum"))
        items = Items.of(keys, values, mass, count, value_weight=value_weight)
        roots = nearest_roots(items, count > 0, [merges for merges in due for _ in range(heads)])
    is_kept = (roots == torch.arange(count.shape[1], device=count.device)) & (count > 0)
    # Spare slots hold zeros, so they can be added to the last slot that is kept.
    place = (is_kept.cumsum(-1) - 1).clamp(min=0).gather(1, roots)
    totals = {name: added_up(parts, place, capacity) for name, parts in streams.items()}
    return {name: total.unflatten(0, (rows, heads)) for name, total in totals.items()}
