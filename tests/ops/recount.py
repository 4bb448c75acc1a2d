"""The rules of the dictionary in plain NumPy, apart from the package: which tokens end in which slot."""

import functools
import itertools

import numpy as np
import torch


def assert_recounted(state, head, slots, k, v):
    """A head of a state of one row holds the tokens of `slots`, lists of token indices, and no others."""
    assert state.count[0, head].tolist() == [len(members) for members in slots]
    for sums, tokens in ((state.key_sum, k), (state.value_sum, v)):
        expected = torch.stack([tokens[0, members, head].sum(0) for members in slots])
        torch.testing.assert_close(sums[0, head], expected, rtol=1e-12, atol=1e-12)


def recount(keys, values, num_slots, chunk_size):
    """Slots of one head by plain NumPy, written apart from the package: lists of token indices."""
    slots = []
    for start in range(0, len(keys) // chunk_size * chunk_size, chunk_size):
        tokens = list(range(start, start + chunk_size))
        seen = start + chunk_size
        wanted = max(len(slots), 1, seen * num_slots // (seen + num_slots))
        if not slots:
            slots.append([tokens.pop(0)])
        means = np.stack([keys[members].mean(0) for members in slots])
        dots = keys[tokens] @ means.T
        cosines = dots / np.linalg.norm(means, axis=1)
        novel = np.argsort(cosines.max(1), kind="stable")[: wanted - len(slots)]
        nearest = dots.argmax(1)
        for j, token in enumerate(tokens):
            if j not in novel:
                slots[nearest[j]].append(token)
        slots += [[tokens[j]] for j in sorted(novel)]
    return slots


def recount_by_likelihood(
    keys, values, num_slots, chunk_size, growth="immediate", value_weight=0.35, *, count_power=1.0
):
    """The same by merge="ward", from its definition: what the sum of squared distances to means grows by.

    With another power of the counts it is the rule "ward-sqrt".
    """

    def clusters(items, num_merged, num_clusters):
        return agglomerated(items, keys, values, num_clusters, value_weight, count_power=count_power)

    return recount_of_items(len(keys), num_slots, chunk_size, growth, clusters)


def recount_by_edges(keys, values, num_slots, chunk_size, growth="immediate", value_weight=0.35):
    """The same by merge="nearest": the shortest edges of a chunk's tokens and of the slots in turn."""

    def clusters(items, num_merged, num_clusters):
        num_slots = len(items) - chunk_size
        in_turn = {(num_merged + i) % num_slots for i in range(min(num_slots, chunk_size))}
        movers = [i for i in range(len(items)) if i in in_turn or i >= num_slots]
        return linked(items, keys, values, num_clusters, value_weight, movers)

    return recount_of_items(len(keys), num_slots, chunk_size, growth, clusters)


def recount_of_items(length, num_slots, chunk_size, growth, clusters):
    """Where `clusters` of (items, tokens merged before, clusters wanted) are, of slots and tokens."""
    slots = []
    for start in range(0, length // chunk_size * chunk_size, chunk_size):
        seen = start + chunk_size
        scheduled = {
            "plateau": seen * num_slots // (seen + num_slots),
            "linear": min(seen // 2, num_slots),
            "immediate": min(seen, num_slots),
        }[growth]
        wanted = min(max(len(slots), scheduled, 1), len(slots) + chunk_size)
        items = [*map(tuple, slots), *((t,) for t in range(start, seen))]
        found = clusters(items, start, wanted)
        # A cluster stays where its lowest slot was; those of tokens alone take what is free, in order.
        slots = [[] for _ in range(wanted)]
        homes = [items.index(next(item for item in items if set(item) <= cluster)) for cluster in found]
        taken = {home for home in homes if home < len(items) - chunk_size}
        free = iter([place for place in range(wanted) if place not in taken])
        for home, cluster in zip(homes, found, strict=True):
            slots[home if home in taken else next(free)] = sorted(cluster)
    return slots


def points_of(items, keys, values, value_weight):
    """Tokens as points, their values in units of the mean values of items."""
    means = np.stack([values[list(item)].mean(0) for item in items])
    power = np.average(np.square(means).sum(1), weights=[len(item) for item in items])
    return np.concatenate([keys, values * (value_weight / power**0.5 if power else 0)], 1)


def linked(items, keys, values, num_clusters, value_weight, movers=None):
    """Items, each a tuple of tokens, joined by the shortest edges: sets of tokens, in order of their lowest.

    All items look for another unless it is said which are the `movers`.
    """
    points, clusters = points_of(items, keys, values, value_weight), dict(enumerate(items))
    looking, nearest = range(len(items)) if movers is None else movers, {}
    for part in itertools.count(1):
        if len(clusters) == num_clusters:
            break
        due = len(clusters) - num_clusters
        means = {i: points[list(cluster)].mean(0) for i, cluster in clusters.items()}

        def distance(a, b, means=means):
            # Rounded, so that what is equal is equal, from both sides.
            return np.square(means[a] - means[b]).sum().round(9)

        for a in looking:
            nearest[a] = min((distance(a, b), b) for b in clusters if b != a)[1]
        nearest = {a: b for a, b in nearest.items() if a != b}
        edges = []
        for a, b in nearest.items():
            cycle = [a]
            while b in nearest and b not in cycle:
                cycle.append(b)
                b = nearest[b]
            if b == a == min(cycle):
                continue
            sizes = [len(clusters[i]) for i in (a, nearest[a])]
            weight = (sizes[0] * sizes[1] / sum(sizes)) ** (1 / 3)
            edges.append((round(distance(a, nearest[a]) * weight, 9), a))
        label = {i: i for i in clusters}
        for _, a in sorted(edges)[: due - due // 2 if part < 4 else due]:
            old, new = label[a], label[nearest[a]]
            assert old != new, "an edge that removes no item"
            label = {i: min(old, new) if x in (old, new) else x for i, x in label.items()}
        groups = {i: [j for j, x in label.items() if x == i] for i in sorted(set(label.values()))}
        clusters = {i: sum((clusters[j] for j in group), ()) for i, group in groups.items()}
        # What was joined looks again; after that all do.
        looking = [i for i, group in groups.items() if len(group) > 1 or part >= 4]
        nearest = {a: label[b] for a, b in nearest.items() if a in clusters}
    return [set(cluster) for cluster in clusters.values()]


def agglomerated(items, keys, values, num_clusters, value_weight, *, count_power=1.0):
    """Items, each a tuple of tokens, merged pair by pair: sets of tokens, in order of their lowest items."""
    points = points_of(items, keys, values, value_weight)

    @functools.cache
    def distortion(tokens):
        members = points[list(tokens)]
        return np.square(members - members.mean(0)).sum()

    def cost(pair):
        union = tuple(sorted(pair[0] + pair[1]))
        # Rounded, so that what is equal is equal; of equal pairs the first is taken.
        harmonic = len(pair[0]) * len(pair[1]) / len(union)
        growth = distortion(union) - distortion(pair[0]) - distortion(pair[1])
        return round(growth * harmonic ** (count_power - 1), 9)

    clusters = [tuple(sorted(item)) for item in items]
    while len(clusters) > num_clusters:
        a, b = min(itertools.combinations(clusters, 2), key=cost)
        clusters[clusters.index(a)] = tuple(sorted(a + b))
        clusters.remove(b)
    return [set(cluster) for cluster in clusters]
