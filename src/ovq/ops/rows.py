"""Checks of the rows and devices that the methods of states and caches are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def checked_device(device: torch.device | str) -> torch.device:
    """`device` as a `torch.device`; ValueError if it is none, or cannot be used here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected a device, found {device!r}") from error
    try:
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        # PyTorch asserts that it was built for CUDA.
        reason = str(error).split("\n")[0]
        raise ValueError(f"device: expected one that can be used here, found {device!r}: {reason}") from error
    return found


def checked_rows(rows: Tensor | Sequence[int], num_rows: int) -> Tensor:
    """Indices `[R]` of the given rows, int64 on the CPU.

    Raises:
        ValueError: if `rows` is neither indices into `num_rows` rows nor a boolean mask of them.

    Example:
        >>> checked_rows([True, False, True], 3)
        tensor([0, 2])
    """
    try:
        index = torch.as_tensor(rows, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"rows: expected integer indices or a boolean mask, found {rows!r}") from error
    if index.dtype == torch.bool:
        if index.shape != (num_rows,):
            raise ValueError(f"rows: expected a mask of shape ({num_rows},), found {tuple(index.shape)}")
        index = index.nonzero().squeeze(-1)
    if index.numel() == 0:
        index = index.to(torch.int64)
    if index.dim() != 1 or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rows: expected a 1-D integer index, found {index.dtype} {tuple(index.shape)}")
    index = index.to(torch.int64)
    if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < num_rows):
        raise ValueError(f"rows: expected indices in 0..{num_rows - 1}, found {index.tolist()}")
    return index
