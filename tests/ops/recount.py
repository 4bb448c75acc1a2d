"""The rules of the dictionary in plain NumPy, apart from the package: which tokens end in which slot."""

import functools
import itertools

import numpy as np


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
    slots = []
    for start in range(0, len(keys) // chunk_size * chunk_size, chunk_size):
        seen = start + chunk_size
        scheduled = {
            "plateau": seen * num_slots // (seen + num_slots),
            "linear": min(seen // 2, num_slots),
            "immediate": min(seen, num_slots),
        }[growth]
        wanted = min(max(len(slots), scheduled, 1), len(slots) + chunk_size)
        items = [*map(tuple, slots), *((t,) for t in range(start, seen))]
        clusters = agglomerated(items, keys, values, wanted, value_weight, count_power=count_power)
        # A cluster stays where its lowest slot was; those of tokens alone take what is free, in order.
        slots = [[] for _ in range(wanted)]
        homes = [items.index(next(item for item in items if set(item) <= cluster)) for cluster in clusters]
        taken = {home for home in homes if home < len(items) - chunk_size}
        free = iter([place for place in range(wanted) if place not in taken])
        for home, cluster in zip(homes, clusters, strict=True):
            slots[home if home in taken else next(free)] = sorted(cluster)
    return slots


def agglomerated(items, keys, values, num_clusters, value_weight, *, count_power=1.0):
    """Items, each a tuple of tokens, merged pair by pair: sets of tokens, in order of their lowest items."""
    means = np.stack([values[list(item)].mean(0) for item in items])
    counts = [len(item) for item in items]
    power = np.average(np.square(means).sum(1), weights=counts)
    points = np.concatenate([keys, values * (value_weight / power**0.5 if power else 0)], 1)

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
