"""Rows packed into one: `cu_seqlens` from the equivalent arguments of transformers and trl."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Keyword arguments of `forward` that describe packing. Maximum lengths are accepted but not needed.
PACKING_KWARGS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})


def packed_offsets(
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    kwargs: Mapping[str, Any],
    *,
    inputs: Tensor,
    is_continued: bool,
) -> Tensor | None:
    """The offsets `[R + 1]` of packed rows, from any of the equivalent arguments; None without packing.

    Args:
        cu_seqlens: `[R + 1]` offsets; or None.
        position_ids: `[B, T]`; in a call of one row without mask and cache, each return to 0 or to the first
            position begins a packed row. None, or positions that rise by one throughout, mean no packing.
        kwargs: given `PACKING_KWARGS`: `cu_seq_lens_q` and `cu_seq_lens_k` are like `cu_seqlens`, `seq_idx`
            `[1, T]` is the row of each token, and maximum lengths are ignored.
        inputs: `[B, T]` or `[B, T, hidden_size]`, the tokens.
        is_continued: whether there is a mask or a cache, to whose columns positions may refer.

    Raises:
        ValueError: if names contradict each other, or rows are packed in a batch of several.

    Example:
        >>> positions = torch.tensor([[0, 1, 2, 0, 1]])
        >>> packed_offsets(None, positions, {}, inputs=positions, is_continued=False)
        tensor([0, 3, 5])
    """
    batch_size, num_tokens = inputs.shape[:2]
    given: dict[str, Tensor | None] = {"cu_seqlens": cu_seqlens}
    given |= {name: kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    seq_idx = kwargs.get("seq_idx")
    check_tensors(**given, seq_idx=seq_idx, position_ids=position_ids)
    if seq_idx is not None:
        if batch_size != 1 or list(seq_idx.shape) != [1, num_tokens]:
            raise ValueError(
                f"seq_idx: expected shape [1, {num_tokens}] with rows packed into one (as cu_seqlens has "
                f"them), found {list(seq_idx.shape)} and a batch of {batch_size}"
            )
        given["seq_idx"] = _offsets(seq_idx[0].diff() != 0)
    if position_ids is not None and not is_continued and position_ids.shape == (1, num_tokens):
        given["position_ids"] = _restarts(position_ids)
    found = {name: offsets.to(inputs.device) for name, offsets in given.items() if offsets is not None}
    if not found:
        return None
    (first, chosen), *others = found.items()
    for name, offsets in others:
        # Some of the arguments cannot express empty rows, so they are ignored here.
        if not torch.equal(chosen.unique().long(), offsets.unique().long()):
            raise ValueError(
                f"expected {name} to pack the same rows as {first}, {chosen.tolist()[:16]}, found rows that "
                f"begin and end at {offsets.tolist()[:16]}; pass cu_seqlens alone"
            )
    return chosen


def check_tensors(**given: Any) -> None:
    """Raise ValueError, naming the first argument that is neither a tensor nor None."""
    for name, x in given.items():
        if x is not None and not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, found {type(x).__name__}")


def _offsets(is_break: Tensor) -> Tensor:
    """Offsets of rows, from a mask `[T - 1]` of the tokens after which a row begins."""
    starts = is_break.nonzero()[:, 0] + 1
    return torch.cat([starts.new_zeros(1), starts, starts.new_full((1,), len(is_break) + 1)])


def _restarts(position_ids: Tensor) -> Tensor | None:
    """Offsets of rows that begin where the positions `[1, T]` restart; None without restarts or with other
    jumps."""
    positions = position_ids[0]
    is_break = positions.diff() != 1
    starts = positions[1:][is_break]
    if len(starts) == 0 or not bool(((starts == 0) | (starts == positions[0])).all()):
        return None
    return _offsets(is_break)
