"""What tests of layers against their formulas share."""

import torch
from torch.utils._pytree import tree_leaves


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_alike_with_gradients(inputs, results):
    """Two results with equal tensors, whose gradients with respect to every input are equal, too."""
    torch.testing.assert_close(*results)
    flat = [tree_leaves(result) for result in results]
    upstream = [random(*x.shape, seed=seed) for seed, x in enumerate(flat[0])]
    grads = (
        torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True)
        for outputs in flat
    )
    torch.testing.assert_close(*grads)
