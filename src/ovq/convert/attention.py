"""The attention function and the mask function that transformers calls in converted models.

Sequences packed into one row get a memory each, for the duration of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from ovq.convert.cache import MARK, MemoryLayer
from ovq.hf.packing import PACKING_KWARGS, packed_offsets
from ovq.ops.checks import row_bounds
from ovq.ops.uncompiled import uncompiled

#: Name under which the functions are registered with transformers.
IMPLEMENTATION = "ovq_memory"

#: Attribute of a converted model's attention modules that holds the layer's `LayerConfig`.
LAYER_CONFIG = "_ovq_layer_config"

#: Keyword argument of `memory_attention` with the number of tokens of each packed row.
ROW_LENGTHS = "_ovq_row_lengths"

# Packed rows of equal lengths are read together up to so many tokens, which bounds the memory for scores.
_MOST_TOKENS = 4096


@uncompiled
def memory_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention `[B, T, H, V]` over a layer's memory and the new tokens, with transformers' signature.

    Args:
        query: `[B, H, T, K]`. key: `[B, Hkv, T, K]`. value: `[B, Hkv, T, V]`.
        attention_mask: `[B, T]`, which of the new tokens are real; None for all.
        scaling: factor of the scores; None for `K ** -0.5`.
        dropout: must be 0. sliding_window, softcap, s_aux: must be None; a model's own windows, soft caps
            and learned sinks are not supported.
        kwargs: other arguments that models pass; only `ROW_LENGTHS` is used.

    Raises:
        ValueError: an argument that the memory does not support.
    """
    if not hasattr(module, LAYER_CONFIG):
        raise ValueError(
            f"{type(module).__name__}: expected one of a model that ovq.convert.attach has converted, found "
            "another, made from the config of such a model: give it attn_implementation='sdpa', or convert "
            "it (as reference of trl: ref_model=ovq.convert.load(...), or precompute_ref_log_probs=True)"
        )
    layer: MemoryLayer | None = getattr(key, MARK, None)
    if layer is not None:
        # Received, so that the cache is still of use after an error below.
        layer.has_staged = False
    for name, found in (("sliding_window", sliding_window), ("softcap", softcap), ("s_aux", s_aux)):
        if found is not None:
            what = found if isinstance(found, (int, float)) else f"a tensor {tuple(found.shape)}"
            raise ValueError(
                f"{type(module).__name__}: expected attention without {name}, found {what}: such models "
                "cannot be converted"
            )
    if dropout:
        raise ValueError(f"dropout: expected 0 in a converted model, found {dropout}")
    if attention_mask is not None and attention_mask.dim() != 2:
        given = tuple(attention_mask.shape) or "a window, both directions, an overlay or positions with gaps"
        raise ValueError(f"mask: expected a causal one, or a mask [B, T] of real tokens, found {given}")
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"keys: expected those of the {query.shape[2]} new tokens, found {key.shape[2]}: another cache "
            "than a MemoryCache (model.make_cache()) has joined them with earlier ones"
        )
    query = query * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if layer is not None:
        o = layer.attend(query, key, value, attention_mask)
        if torch.is_grad_enabled():
            layer.detach_()
        return o.transpose(1, 2), None
    lengths = kwargs.get(ROW_LENGTHS, [query.shape[2]])
    groups: dict[int, list[int]] = {}
    for row, num in enumerate(lengths):
        groups.setdefault(num, []).append(row)
    rows, parts = [x.split(lengths, 2) for x in (query, key, value)], {}
    for num, alike in groups.items():
        most = max(1, _MOST_TOKENS // max(1, num))
        for some in (alike[i : i + most] for i in range(0, len(alike), most)):
            q, k, v = (torch.cat([x[row] for row in some]) for x in rows)
            o = MemoryLayer(getattr(module, LAYER_CONFIG), num).attend(q, k, v, attention_mask)
            for row, part in zip(some, o.split(len(query)), strict=True):
                parts[row] = part
    return torch.cat([parts[row] for row in range(len(lengths))], 2).transpose(1, 2), None


@uncompiled
def memory_mask(
    batch_size: int,
    q_length: int,
    *args: Any,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask `[B, T]` of the real new tokens, None if all are; with the signature of transformers.

    Where it is not causal with padding, such as for a window or positions with gaps, a scalar, which
    `memory_attention` refuses: some models, such as Qwen2-MoE, make a mask that no layer reads.

    Raises:
        ValueError: a mask with a wrong number of rows or too few columns.
    """
    if mask_function is not causal_mask_function:
        return torch.tensor(False)
    if attention_mask is None:
        return None
    if attention_mask.shape[0] != batch_size or attention_mask.shape[1] < q_length:
        raise ValueError(
            f"attention_mask: expected {batch_size} rows of at least the {q_length} new tokens, found "
            f"{tuple(attention_mask.shape)}"
        )
    new = attention_mask[:, -q_length:].bool()
    return None if bool(new.all()) else new


def packed_arguments(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments of the base model's `forward` for a call with packed rows; None if no rows are packed.

    Args:
        given: arguments of the call by name. `cu_seqlens`, `PACKING_KWARGS` and restarting `position_ids`
            describe packing, as in models of `ovq.hf`.

    Raises:
        ValueError: packed rows with a mask or a cache, in a batch of several, or contradictory offsets.
    """
    names = ("input_ids", "inputs_embeds")
    inputs = next((given[name] for name in names if given.get(name) is not None), None)
    if inputs is None:
        # The model itself raises the error for missing inputs.
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
    # Given a mask without padding, transformers derives none from the positions.
    mask = torch.ones(1, num_tokens, dtype=torch.int64, device=inputs.device)
    own = {"position_ids": positions, "attention_mask": mask, "use_cache": False}
    return others | own | {ROW_LENGTHS: [num for num in lengths if num]}


def check_implementation(found: Any) -> None:
    """Raise ValueError for any attention implementation but the memory's, which others would not reach."""
    if found != IMPLEMENTATION:
        raise ValueError(
            f"attn_implementation: expected {IMPLEMENTATION!r}, the memory of a converted model, found "
            f"{found!r}: its original has full attention (set_attn_implementation({IMPLEMENTATION!r}) "
            "undoes it)"
        )


AttentionInterface.register(IMPLEMENTATION, memory_attention)
AttentionMaskInterface.register(IMPLEMENTATION, memory_mask)
