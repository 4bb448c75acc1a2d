"""The rate of the kernels' own product loop alone: the roof that `ovq bench` compares them with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ovq.ops.backends.cpu.kernels import is_available
from ovq.ops.backends.cpu.tokens import call_kernel


def product_loop() -> tuple[Callable[[], None], float] | None:
    """A function that multiplies float32 matrices on all threads, and its FLOPs; None without kernels."""
    if not is_available():
        return None
    sizes = torch.zeros(3, dtype=torch.int64)
    call_kernel("ovq_roof_sizes", sizes)
    m, n, k = sizes.tolist()
    threads = torch.get_num_threads()
    a, b, c = (torch.ones(threads, size, dtype=torch.float32) for size in (m * k, k * n, m * n))
    repeats = int(2e9 / (2 * m * n * k))

    def call() -> None:
        call_kernel("ovq_roof", threads, repeats, a, b, c)

    return call, 2.0 * m * n * k * repeats * threads
