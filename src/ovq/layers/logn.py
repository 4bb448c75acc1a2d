"""Log-n scaling of logits, which keeps the softmax as sharp beyond the training length as within it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ovq.layers.layout import SequenceLayout


def check_logn_length(length: int | None) -> None:
    """Raise ValueError unless `length` is None or an integer of at least 2."""
    if length is None:
        return
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise ValueError(f"expected logn_length to be None or an integer of at least 2, found {length!r}")


def logn_factor(place: int, length: int) -> float:
    """Factor of the logits of the token at `place` (from 1) in its row.

    It is log `place` / log `length` beyond `length` tokens, else 1 (`docs/method/math.md`, section 9).

    Example:
        >>> logn_factor(256, 256), logn_factor(65536, 256)
        (1.0, 2.0)
    """
    return max(1.0, math.log(place) / math.log(length))


def logn_factors(
    layout: SequenceLayout, length: int, *, like: Tensor, num_seen: Tensor | None = None
) -> Tensor | None:
    """Factors `[B, T]` of the logits of the new tokens of a call.

    `[1, T]` if all rows are alike; None if all factors are 1.

    Args:
        layout: padding and packing of the call.
        length: number of tokens up to which the factor is 1, at least 2.
        like: a tensor with the wanted dtype and device.
        num_seen: as in `SequenceLayout.places`.
    """
    if num_seen is None:
        num_past = layout.num_past
    else:
        # The number of tokens seen is unknown while `torch.compile` traces.
        num_past = length if torch.compiler.is_compiling() else max(num_seen.tolist(), default=0)
    if num_past + layout.num_new <= length:
        return None
    places = layout.places(num_seen).to(like.device, torch.promote_types(like.dtype, torch.float32))
    # log t / log T as 1 + log(t / T) / log T, which is exactly 1 up to T: log T / log T may round to another.
    return (1 + (places / length).clamp(min=1).log() / math.log(length)).to(like.dtype)
