"""`row_bounds`: where the tokens of each row lie. In a graph of `torch.compile`, an operator finds out."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.checks import found_bounds


def row_bounds(
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, batch_size: int, num_past: int, num_new: int
) -> Tensor:
    """`RowBounds.bounds` of the new columns of a call: `[2, R]` int64 on the CPU.

    Args:
        attention_mask: `[B, P + T]` over cached and new columns; or None.
        cu_seqlens: `[R + 1]` offsets of packed rows; or None.
        batch_size: B.
        num_past: P.
        num_new: T.

    Raises:
        ValueError: if the mask or the offsets do not fit; in a graph, when it runs.

    Example:
        >>> row_bounds(torch.tensor([[0, 1, 1, 1]]), None, 1, 2, 2)
        tensor([[0],
                [2]])
    """
    find = torch.ops.ovq.row_bounds if torch.compiler.is_compiling() else found_bounds
    return find(attention_mask, cu_seqlens, batch_size, num_past, num_new)


def _fake(
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, batch_size: int, num_past: int, num_new: int
) -> Tensor:
    num_rows = batch_size if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty(2, num_rows, dtype=torch.int64, device="cpu")


# Not by `torch.library.custom_op`, which loads the compiler.
_LIBRARY = torch.library.Library("ovq", "FRAGMENT")
_LIBRARY.define(
    "row_bounds(Tensor? attention_mask, Tensor? cu_seqlens, "
    "SymInt batch_size, SymInt num_past, SymInt num_new) -> Tensor"
)
_LIBRARY.impl("row_bounds", found_bounds, "CompositeExplicitAutograd")
torch.library.register_fake("ovq::row_bounds", _fake, lib=_LIBRARY)
