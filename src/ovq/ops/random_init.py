"""Random choice of the keys that open slots: the ablation `init="random"`."""

import torch
from torch import Tensor

# Odd 64-bit constants of the splitmix generator: they spread neighbouring (head, chunk) pairs over all seeds.
_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 63) - 1


def random_priority(seed: int, head: int, num_seen: int, chunk_size: int) -> Tensor:
    """A random order of the chunk that ends at token `num_seen`, as priorities `[C]`; the lowest open slots.

    It depends only on the seed, the head and the position, not on how far a generator has advanced: a stream
    opens the same slots however it is batched or cut into calls.

    Example:
        >>> bool((random_priority(0, 1, 64, 32) == random_priority(0, 1, 64, 32)).all())
        True
        >>> bool((random_priority(0, 1, 64, 32) == random_priority(0, 2, 64, 32)).all())
        False
    """
    mixed = ((seed * _MIX + head) * _MIX + num_seen) * _MIX
    generator = torch.Generator().manual_seed((mixed ^ (mixed >> 31)) & _MASK)
    return torch.randperm(chunk_size, generator=generator).to(torch.float64)
