"""Rotary frequencies of a model, which re-positioning needs (`Reach`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ovq.convert.config import LEAST_LENGTH, MemoryConfig
from ovq.convert.reach import Reach
from ovq.hf.cache import CACHE_KEY
from ovq.ops.sums import state_dtype
from ovq.runtime.modes import evaluating

# Rotary types whose frequencies depend on the length of the text.
_CHANGING = ("dynamic", "longrope")
# A token is read at position 0 and at this position. Tolerances are for the difference between its keys there
# and the rotated keys of position 0, relative to their norm.
_POSITIONS = 37
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
_TOLERANCE_OF_NARROW = 0.05


def with_reach(config: MemoryConfig, model: PreTrainedModel) -> MemoryConfig:
    """`config` with the `trained_length` and `rotary_frequencies` of a model not converted yet, if known.

    Given frequencies are replaced by those that the model computes with.

    Raises:
        ValueError: a length or a distance is given, but the rotary frequencies are not known; or the
            frequencies that are given are those of another model.
    """
    if (given := config.rotary_frequencies) is not None:
        own = _frequencies(model)
        # Either may have been rounded to 16 bits.
        if own is None or len(own) != len(given) or not np.allclose(own, given, rtol=0.02, atol=0):
            raise ValueError(
                f"rotary_frequencies: expected those of this {type(model).__name__}, found others: the "
                "config is of another model; leave them and trained_length out (None)"
            )
        return dataclasses.replace(config, rotary_frequencies=own)
    if (length := config.trained_length) is None:
        length = getattr(model.config, "max_position_embeddings", None)
        length = length if isinstance(length, int) and length >= LEAST_LENGTH else None
    found = None if length is None else rotary_frequencies(model)
    if found is not None:
        return dataclasses.replace(config, trained_length=length, rotary_frequencies=found)
    for name in ("trained_length", "max_distance"):
        if (number := getattr(config, name)) is not None:
            raise ValueError(
                f"{name}: expected None, found {number}: {type(model).__name__} does not rotate all keys by "
                "the same fixed angles per position, or does not say which, so keys cannot be re-positioned"
            )
    return config


def rotary_frequencies(model: PreTrainedModel) -> list[float] | None:
    """Rotary angles per position of a model's keys, in the order of `Reach.frequencies`.

    None if there are none, or the keys of some layer do not agree with them.
    """
    if (found := _frequencies(model)) is None:
        return None
    first, later = (_keys(model, position) for position in (0, _POSITIONS))
    reach = Reach(trained_length=_POSITIONS, max_distance=_POSITIONS, frequencies=tuple(found))
    tolerance = _TOLERANCE.get(model.dtype, _TOLERANCE_OF_NARROW)
    for before, after in zip(first, later, strict=True):
        if before.shape[-1] < 2 * len(found):
            return None
        turned = reach.turned(before, torch.full(before.shape[:-1], _POSITIONS, device=before.device))
        if not float((turned - after).norm()) < tolerance * float(after.norm()):
            return None
    return found


def rotary_buffers(model: Any) -> list[tuple[Any, Tensor]]:
    """The modules of a model that have rotary frequencies, each with these."""
    return [(m, m.inv_freq) for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]


def _frequencies(model: PreTrainedModel) -> list[float] | None:
    """What a model says of these angles, if they are fixed."""
    modules = rotary_buffers(model)
    if len(modules) != 1 or getattr(modules[0][0], "rope_type", "default") in _CHANGING:
        return None
    return torch.as_tensor(modules[0][1]).double().tolist()


@torch.no_grad()
def _keys(model: Any, position: int) -> list[Tensor]:
    """The keys of a token at a position, `[1, Hkv, 1, K]` of each layer."""
    with evaluating(model):
        cache = DynamicCache(config=model.config)
        # Not token 0, which is often the padding token, without a learned embedding.
        token, place = (torch.tensor([[x]], device=model.device) for x in (1, position))
        model.base_model(token, position_ids=place, **{CACHE_KEY: cache}, use_cache=True)
    keys: list[Tensor] = [layer.keys for layer in cache.layers]  # type: ignore[union-attr, misc]  # all of these have keys
    return [k.to(state_dtype(k.dtype)) for k in keys]
