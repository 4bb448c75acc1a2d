"""Random choice of the keys that open slots: the ablation `init="random"`."""

import torch
from torch import Tensor

# Odd 64-bit constants of the splitmix generator: they spread neighbouring (head, chunk) pairs over all seeds.
_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 63) - 1


def random_priority(seed: int, head: int, num_seen: int, chunk_size: int) -> Tensor:
    """Random priorities `[C]` of the keys of the chunk that ends at token `num_seen`; the lowest open slots.

    They depend only on the seed, the head and the position, not on the state of a generator, so a stream
    opens the same slots however it is batched or split into calls.
    """
    mixed = ((seed * _MIX + head) * _MIX + num_seen) * _MIX
    generator = torch.Generator().manual_seed((mixed ^ (mixed >> 31)) & _MASK)
    return torch.randperm(chunk_size, generator=generator).to(torch.float64)


def seed_of(init: str, generator: torch.Generator | None) -> int:
    """The seed of a call: that of `generator`, else of PyTorch's default generator; 0 if nothing is random.

    Raises:
        ValueError: if `generator` is neither None nor a `torch.Generator`.

    Example:
        >>> seed_of("random", torch.Generator().manual_seed(5)), seed_of("novelty", None)
        (5, 0)
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator: expected a torch.Generator, found {generator!r}")
    if init != "random":
        return 0
    return torch.initial_seed() if generator is None else generator.initial_seed()
