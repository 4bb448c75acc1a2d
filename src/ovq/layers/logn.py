"""Log-n scaling: a softmax over more tokens than a model was trained on reads as sharply as it learned to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ovq.layers.layout import SequenceLayout


def check_logn_length(length: int | None) -> None:
    """Raise ValueError unless `length` is a number of tokens to scale beyond, or None."""
    if length is None:
        return
    if not isinstance(length, int) or isinstance(length, bool) or length < 2:
        raise ValueError(f"expected logn_length to be None or an integer of at least 2, found {length!r}")


def logn_factor(place: int, length: int) -> float:
    """What the logits of the token at `place` (from 1) in its row are multiplied by.

    It is log `place` / log `length` beyond `length` tokens, and 1 up to there
    (`docs/method/math.md`, section 9).

    Example:
        >>> logn_factor(256, 256), logn_factor(65536, 256)
        (1.0, 2.0)
    """
    return max(1.0, math.log(place) / math.log(length))


def logn_factors(
    layout: SequenceLayout, length: int, *, like: Tensor, num_seen: Tensor | None = None
) -> Tensor | None:
    """The factors of the new tokens of a call.

    Args:
        layout: the padding and packing of the call.
        length: tokens up to which all factors are 1, at least 2.
        like: a tensor of the dtype and on the device wanted.
        num_seen: as in `SequenceLayout.places`.

    Returns:
        `[B, T]`, or `[1, T]` where all rows are alike; None where all factors are 1.

    Example:
        >>> layout = SequenceLayout.of(None, batch_size=1, num_past=14, num_new=2)
        >>> logn_factors(layout, 4, like=torch.empty(0))
        tensor([[1.9534, 2.0000]])
    """
    if num_seen is None:
        num_past = layout.num_past
    else:
        # A graph does not know what a state has counted.
        num_past = length if torch.compiler.is_compiling() else max(num_seen.tolist(), default=0)
    if num_past + layout.num_new <= length:
        return None
    places = layout.places(num_seen).to(like.device, torch.promote_types(like.dtype, torch.float32))
    return (places.clamp(min=length).log() / math.log(length)).to(like.dtype)
