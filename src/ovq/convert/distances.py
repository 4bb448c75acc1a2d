"""`Distances`: between which keys and values a head tells best, learned from texts without training.

Two tokens should share a slot if the output of the head hardly changes by it, as far as the loss depends on
that output. If the key of token i changes by d, the score of query t changes by q_t . d, its probability
p_ti by as much times itself, the output by p_ti (q_t . d)(v_i - o_t), and the loss by the product of this
with its gradient g_t. If the value changes by d, the loss changes by p_ti (g_t . d). So the mean squares of

    (g_t . (v_i - o_t)) q_t   and   g_t,   weighted by p_ti,

say how much each number of a key, and a value, matters [ours]. The squares of a key's numbers are taken one
by one, because multiplying keys by powers of 2 and dividing queries by them changes no score, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Queries compared at a time with all tokens.
_QUERIES = 256
# Numbers of a key that matter less than the one that matters most by more than this are taken as if they
# mattered so much.
_RANGE = 5


def far_attention(
    q: Tensor, k: Tensor, v: Tensor, *, o: Tensor, g: Tensor, num_sinks: int, num_recent: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """What queries see of tokens that may be in slots, some queries of a key/value head at a time.

    Args:
        q: `[1, H, t, K]` queries, scaled, of the last t tokens of a text. k: `[1, Hkv, T, K]` of all of them.
        v: `[1, Hkv, T, V]`. o: `[1, H, t, V]` outputs. g: `[1, H, t, V]` gradients of the loss.
        num_sinks: first tokens, and num_recent: last ones before a query, itself included, that never are in
            slots.

    Yields:
        The head; its queries `[G, n, K]` and their gradients `[G, n, V]`; the probabilities `[G, n, T]`, 0
        for tokens that are not in slots; and g . (v - o) `[G, n, T]`, by how much the loss rises if a query
        sees more of a token.
    """
    heads, total = k.shape[1], k.shape[2]
    places = torch.arange(total, device=k.device)
    for part in torch.arange(total - q.shape[2], total, device=k.device).split(_QUERIES):
        own = part - total + q.shape[2]
        is_past = places <= part[:, None]
        is_far = (places <= part[:, None] - num_recent) & (places >= num_sinks)
        for head in range(heads):
            queries, outputs, slopes = (
                x[0, :, own].float().unflatten(0, (heads, -1))[head] for x in (q, o, g)
            )
            keys, values = k[0, head].float(), v[0, head].float()
            p = (queries @ keys.T).masked_fill(~is_past, -torch.inf).softmax(-1) * is_far
            yield head, queries, slopes, p, slopes @ values.T - (slopes * outputs).sum(-1, keepdim=True)


class Distances:
    """What matters to the key/value heads of a layer; texts are added one by one.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> distances = Distances(1, 2)
        >>> k, v = (torch.randn(1, 1, 9, n, generator=generator) for n in (2, 3))
        >>> o = torch.zeros_like(v)
        >>> q = torch.tensor([8.0, 1.0]).expand_as(k)
        >>> distances.start(k, v, num_targets=9)
        >>> for part in far_attention(q, k, v, o=o, g=torch.ones_like(o), num_sinks=1, num_recent=4):
        ...     distances.see(*part)
        >>> distances.key_exponents()
        [[2, -2]]
    """

    def __init__(self, num_heads: int, key_dim: int) -> None:
        self._of_keys = torch.zeros(num_heads, key_dim, dtype=torch.float64, device="cpu")
        self._of_values = torch.zeros(num_heads, dtype=torch.float64, device="cpu")
        self._key_squares = torch.zeros(num_heads, key_dim, dtype=torch.float64, device="cpu")
        self._value_squares = torch.zeros(num_heads, dtype=torch.float64, device="cpu")
        self._num_targets = 1

    def start(self, k: Tensor, v: Tensor, *, num_targets: int) -> None:
        """Begin with a text, k and v as for `far_attention`, of which the losses of so many tokens count.

        Texts count the same whatever their length.
        """
        self._key_squares += k[0].double().square().mean(1).cpu()
        self._value_squares += v[0].double().square().sum(-1).mean(1).cpu()
        self._num_targets = num_targets

    @torch.no_grad()
    def see(self, head: int, queries: Tensor, slopes: Tensor, p: Tensor, change: Tensor) -> None:
        """Learn from a part of the text, which is what `far_attention` yields."""
        of_query = (p * change.square()).sum(-1, keepdim=True)
        self._of_keys[head] += ((of_query * queries.square()).sum((0, 1)) / self._num_targets).cpu()
        of_value = (p.sum(-1) * slopes.square().mean(-1)).sum() / self._num_targets
        self._of_values[head] += float(of_value)

    def key_exponents(self) -> list[list[int]]:
        """By which powers of 2 keys are to be multiplied, `[Hkv][K]`; 0 on average."""
        found = self._of_keys.log2() / 2
        most = found.amax(-1, keepdim=True)
        # A head whose output does not matter, or that sees no far tokens.
        found = torch.where(most.isfinite(), found.clamp(min=most - _RANGE), 0)
        return (found - found.mean(-1, keepdim=True)).round().int().tolist()

    def value_weights(self) -> list[float]:
        """The weight of values beside such keys, `[Hkv]`, rounded to powers of 2; 1 where nothing matters."""
        factors = torch.exp2(torch.tensor(self.key_exponents(), dtype=torch.float64, device="cpu"))
        # What multiplying keys by the roots of `_of_keys` would do, divided by what these factors do.
        unit = (self._of_keys * self._key_squares / factors.square()).sum(-1) / self._key_squares.sum(-1)
        length = (factors.square() * self._key_squares).sum(-1)
        weights = (self._of_values * self._value_squares / (unit * length)).sqrt()
        is_usable = weights.isfinite() & (weights > 0)
        return torch.exp2(torch.where(is_usable, weights, 1).log2().round()).tolist()
