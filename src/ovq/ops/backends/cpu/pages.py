"""New tensors in large pages of memory."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Bytes of a large page, and from which on a tensor is worth them.
PAGE, LARGE = 2 << 20, 4 << 20


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor that a kernel will fill.

    Linux provides new memory page by page, when it is first written to, and a page of 2 MiB takes it much
    less time than 512 of 4 KiB. Where there are no large pages, or none left, the tensor is as any other.
    """
    x = torch.empty(shape, dtype=dtype)
    advise = _advise()
    # Only what lies wholly within the tensor.
    start, end = -(-x.data_ptr() // PAGE) * PAGE, (x.data_ptr() + x.nbytes) // PAGE * PAGE
    if x.nbytes >= LARGE and advise is not None:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return x


@functools.cache
def _advise() -> Callable[..., int] | None:
    """`madvise` of the C library where it knows of large pages."""
    return getattr(ctypes.CDLL(None), "madvise", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
