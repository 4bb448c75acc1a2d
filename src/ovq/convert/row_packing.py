"""Rows packed into one, in converted models: each has a memory of its own, for the length of the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ovq.hf.packing import PACKING_KWARGS, packed_offsets
from ovq.ops.row_bounds import row_bounds

#: The keyword argument by which the attention function learns how many tokens each packed row has.
ROW_LENGTHS = "_ovq_row_lengths"


def packed_arguments(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a base model's `forward` where rows are packed into one; None where none are.

    Args:
        given: those of the call, by name: `cu_seqlens`, `PACKING_KWARGS` and restarting `position_ids`, as
            models of `ovq.hf` take them.

    Raises:
        ValueError: packed rows with a mask or a cache, in a batch of several, or that contradict each other.
    """
    names = ("input_ids", "inputs_embeds")
    inputs = next((given[name] for name in names if given.get(name) is not None), None)
    if inputs is None:
        # The model says that it has nothing to read.
        return None
    positions, has_mask = given.get("position_ids"), given.get("attention_mask") is not None
    offsets = packed_offsets(given.get("cu_seqlens"), positions, given, inputs=inputs, is_continued=has_mask)
    if offsets is None:
        if positions is None or has_mask or len(positions) == 1 or bool((positions.diff() > 0).all()):
            return None
        raise ValueError(
            f"position_ids: expected packed rows in a batch of 1, found positions that start again in a "
            f"batch of {len(positions)}"
        )
    for name in ("attention_mask", "past_key_values", "cache"):
        if given.get(name) is not None:
            raise ValueError(f"{name}: expected None in a call with packed rows, found one")
    num_tokens = inputs.shape[1]
    lengths = row_bounds(None, offsets, inputs.shape[0], 0, num_tokens)[1].tolist()
    if positions is None:
        positions = torch.cat([torch.arange(num, device=inputs.device) for num in lengths])[None]
    others = {name: x for name, x in given.items() if name not in {"cu_seqlens", *PACKING_KWARGS}}
    # With a mask of no padding, transformers makes no mask of its own from the positions.
    mask = torch.ones(1, num_tokens, dtype=torch.int64, device=inputs.device)
    own = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
    return others | own | {ROW_LENGTHS: [num for num in lengths if num]}
