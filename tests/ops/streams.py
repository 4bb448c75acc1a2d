"""Streams of tokens on which rules that merge pairs are compared, and what is compared."""

import dataclasses
import functools

import torch
from torch.nn.functional import normalize

from tests.ops.common import attend, inputs

LENGTH, CHUNK_SIZE = 60, 12
STREAMS = ("random", "clustered", "repeated", "one-hot", "no values", "long and short", "not finite")
PARTS = ("key_sum", "value_sum", "pending_keys", "pending_values")


def stream(kind, dtype, *, length=LENGTH, dim=8):
    """Tokens of two heads: q, k `[1, T, 2, K]` and v."""
    q, k, v = inputs(1, length, 2, 2, dim, 6, seed=3)
    which = torch.randint(9, (length,), generator=torch.Generator().manual_seed(1))
    if kind == "clustered":
        k = normalize(k[:, which] + 0.1 * k, dim=-1)
        v = v[:, which] + 0.2 * v
    elif kind == "repeated":  # also in part: equal keys with two values
        k, v = k[:, which], v[:, which % 5]
    elif kind == "one-hot":  # distances of equal pairs are equal, and are not zero
        k = torch.eye(dim, dtype=q.dtype)[which % dim][None, :, None].expand_as(k)
        v = torch.eye(6, dtype=q.dtype)[which % 3][None, :, None].expand_as(v)
    elif kind == "no values":
        v = torch.zeros_like(v)
    elif kind == "long and short":
        large = 1e4 if dtype == torch.float16 else 1e15
        k = k * torch.tensor([1.0, large, 1 / large])[torch.arange(length) % 3, None, None]
        v = v * torch.tensor([1.0, 1.0, large, 1 / large, 0.0])[torch.arange(length) % 5, None, None]
    elif kind == "not finite":
        for x, t, bad in ((k, 5, torch.nan), (v, 14, torch.inf), (k, 30, -torch.inf), (v, 31, torch.nan)):
            x[0, t, 1, 2] = bad
    return [x.to(dtype) for x in (q, k, v)]


@functools.cache
def reference(kind, dtype, **options):
    return attend(*stream(kind, dtype), **options, chunk_size=CHUNK_SIZE, backend="naive")


def check_equal(backend, dtype, kind, **options):
    """The same sums to the last bit: the same tokens, added in the same order."""
    o, state = attend(*stream(kind, dtype), **options, chunk_size=CHUNK_SIZE, backend=backend)
    o_ref, expected = reference(kind, dtype, **options)
    assert_same_sums(state, expected)
    bound = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    if kind not in ("long and short", "not finite"):
        torch.testing.assert_close(o, o_ref, rtol=bound, atol=bound)


def assert_same_sums(state, expected):
    """The same to the last bit, in what is not a number too."""
    assert torch.equal(state.count, expected.count)
    for name in ("key_sum", "value_sum"):
        torch.testing.assert_close(
            getattr(state, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True
        )


def tokens_of(keys, values=None):
    """q, k, v of one head from rows of numbers; values that say which token each is, for w = 0."""
    k = torch.as_tensor(keys, dtype=torch.float32)[None, :, None]
    v = torch.arange(1.0, k.shape[1] + 1).view(1, -1, 1, 1) if values is None else values
    return k, k, v


def gradients_from(state, tokens, backend, options):
    """Of a loss of outputs and final state, with respect to tokens, scale and initial state."""
    scale = torch.linspace(1, 3, tokens[0].shape[2], dtype=state.key_sum.dtype)
    leaves = [x.clone().requires_grad_() for x in (*tokens, scale, *(getattr(state, p) for p in PARTS))]
    before = dataclasses.replace(state, **dict(zip(PARTS, leaves[4:], strict=True)))
    o, after = attend(*leaves[:3], scale=leaves[3], initial_state=before, backend=backend, **options)
    loss = (o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o)).sum()
    loss = loss + sum(getattr(after, name).sin().sum() for name in PARTS)
    return after, torch.autograd.grad(loss, leaves)
