"""`Distances`: metrics for keys and values of each head, learned from texts without training.

Two tokens should share a slot if that hardly changes the head's output in directions that the loss depends
on. To first order, if the key of token i changes by d, the score of query t changes by q_t . d, the output by
p_ti (q_t . d)(v_i - o_t), and the loss by the inner product of that with the gradient g_t of the output. If
the value changes by d, the loss changes by p_ti (g_t . d). So the mean squares of

    (g_t . (v_i - o_t)) q_t   and   g_t,   weighted by p_ti,

measure the importance of each key component, and of the value [ours]. The metric of keys is diagonal, because
multiplying key components by powers of 2 and dividing queries by them leaves all scores bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Queries scored at a time against all tokens: few, so that a block stays in the cache of a core.
_QUERIES = 64
# Key exponents are at least the largest one of the head minus this.
_RANGE = 5


def far_attention(
    q: Tensor, k: Tensor, v: Tensor, *, o: Tensor, g: Tensor, num_sinks: int, num_recent: int
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """Attention to tokens that may be in slots, for a block of queries of one key/value head at a time.

    Args:
        q: `[1, H, t, K]` queries, scaled, of the last t tokens of a text. k: `[1, Hkv, T, K]` of all of them.
        v: `[1, Hkv, T, V]`. o: `[1, H, t, V]` outputs. g: `[1, H, t, V]` gradients of the loss.
        num_sinks: first tokens, never in slots. num_recent: last tokens up to a query, itself included, not
            in slots yet.

    Yields:
        The head; its queries `[G, n, K]` and the gradients of their outputs `[G, n, V]`; then for the tokens
        from `num_sinks` on, as many as are in slots for any of these queries, `[G, n, t']` each: the
        probabilities, 0 where a token is not in a slot, and g . (v - o), the derivative of the loss with
        respect to the score, divided by the probability.
    """
    heads, total = k.shape[1], k.shape[2]
    for start in range(total - q.shape[2], total, _QUERIES):
        end = min(start + _QUERIES, total)
        own = slice(start - total + q.shape[2], end - total + q.shape[2])
        # Of the tokens up to `end`, and of those in slots, only the last ones differ by query.
        is_later = torch.ones(end - start, end - start, dtype=torch.bool, device=k.device).triu(1)
        far = slice(num_sinks, max(num_sinks, end - num_recent))
        for head in range(heads):
            queries, outputs, slopes = (
                x[0, :, own].float().unflatten(0, (heads, -1))[head] for x in (q, o, g)
            )
            scores = queries @ k[0, head, :end].float().T
            scores[..., start:].masked_fill_(is_later, -torch.inf)
            p = scores.softmax(-1)[..., far]
            width = min(end - start, p.shape[-1])
            p[..., -width:].masked_fill_(is_later[:, end - start - width :], 0)
            change = slopes @ v[0, head, far].float().T - (slopes * outputs).sum(-1, keepdim=True)
            yield head, queries, slopes, p, change


class Distances:
    """Importance of key components and values for the key/value heads of a layer; adds texts one by one."""

    def __init__(self, num_heads: int, key_dim: int) -> None:
        self._of_keys = torch.zeros(num_heads, key_dim, dtype=torch.float64, device="cpu")
        self._of_values = torch.zeros(num_heads, dtype=torch.float64, device="cpu")
        self._key_squares = torch.zeros(num_heads, key_dim, dtype=torch.float64, device="cpu")
        self._value_squares = torch.zeros(num_heads, dtype=torch.float64, device="cpu")
        self._num_targets = 1

    def start(self, k: Tensor, v: Tensor, *, num_targets: int) -> None:
        """Begin a text with `k` and `v` as in `far_attention` and `num_targets` tokens whose losses count.

        Texts have equal weights, whatever their length.
        """
        self._key_squares += k[0].double().square().mean(1).cpu()
        self._value_squares += v[0].double().square().sum(-1).mean(1).cpu()
        self._num_targets = num_targets

    @torch.no_grad()
    def see(self, head: int, queries: Tensor, slopes: Tensor, p: Tensor, change: Tensor) -> None:
        """Add a part of the text, as yielded by `far_attention`."""
        of_query = torch.linalg.vecdot(p * change, change)[..., None]
        self._of_keys[head] += ((of_query * queries.square()).sum((0, 1)) / self._num_targets).cpu()
        of_value = (p.sum(-1) * slopes.square().mean(-1)).sum() / self._num_targets
        self._of_values[head] += float(of_value)

    def key_exponents(self) -> list[list[int]]:
        """Exponents of the powers of 2 that scale key components, `[Hkv][K]`; 0 on average."""
        found = self._of_keys.log2() / 2
        most = found.amax(-1, keepdim=True)
        # 0 for a head whose output does not affect the loss, or that sees no far tokens.
        found = torch.where(most.isfinite(), found.clamp(min=most - _RANGE), 0)
        return (found - found.mean(-1, keepdim=True)).round().int().tolist()

    def value_weights(self) -> list[float]:
        """`value_weight` beside such keys, `[Hkv]`, rounded to powers of 2; 1 if the head has no effect."""
        factors = torch.exp2(torch.tensor(self.key_exponents(), dtype=torch.float64, device="cpu"))
        # Mean ratio of the importance of key components to their squared factors, weighted by their squares.
        unit = (self._of_keys * self._key_squares / factors.square()).sum(-1) / self._key_squares.sum(-1)
        length = (factors.square() * self._key_squares).sum(-1)
        weights = (self._of_values * self._value_squares / (unit * length)).sqrt()
        is_usable = weights.isfinite() & (weights > 0)
        return torch.exp2(torch.where(is_usable, weights, 1).log2().round()).tolist()
