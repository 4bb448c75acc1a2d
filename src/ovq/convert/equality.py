"""Whether a converted model computes what it did before, on a few tokens of which none is merged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ovq.convert.cache import MemoryCache
from ovq.hf.cache import CACHE_KEY
from ovq.hf.generation import execution_device
from ovq.runtime.modes import evaluating

# Tokens on which the model is compared before and after, and tolerances: the root mean square of the logit
# differences relative to that of the logits. A single bfloat16 logit may differ by far more.
_CHECK_TOKENS = 6
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_TOLERANCE_OF_NARROW = 0.1


@torch.no_grad()
def some_logits(model: Any, cache: MemoryCache | None = None) -> Tensor:
    """Logits of a few tokens, read in two calls if there is a cache."""
    device = execution_device(model, model.device)
    ids = torch.arange(_CHECK_TOKENS, device=device)[None] % model.config.vocab_size
    with evaluating(model):
        if cache is None:
            return model(ids, use_cache=False).logits
        parts = ids.split([_CHECK_TOKENS // 2, _CHECK_TOKENS - _CHECK_TOKENS // 2], dim=1)
        return torch.cat([model(part, **{CACHE_KEY: cache}).logits for part in parts], dim=1)


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def difference(found: Tensor, before: Tensor) -> float:
    """Root-mean-square difference of logits `[1, T, vocab_size]`; median over tokens for narrow dtypes."""
    change = found - before
    if change.dtype in _TOLERANCE:
        return _size(change)
    # The median, because rounding can change a single token's logits entirely where the huge activations of
    # the first token are at a tipping point.
    return float(change.double().square().mean(-1).sqrt().quantile(0.5))


def check_equal(model: Any, before: Tensor) -> None:
    """Raise ValueError unless the logits equal those from before, as long as nothing has been merged."""
    num_kept = min(model.memory_config.num_sinks + min(map(min, model.memory_config.window)), _CHECK_TOKENS)
    name = type(model).__name__
    tolerance = _TOLERANCE.get(before.dtype, _TOLERANCE_OF_NARROW) * max(1.0, _size(before))
    cache = model.make_cache()
    for what, found in (("", some_logits(model)), (" with a cache", some_logits(model, cache))):
        apart = difference(found[:, :num_kept], before[:, :num_kept])
        if not apart <= tolerance:
            raise ValueError(
                f"{name}: expected the same logits before and after{what}, found a difference of "
                f"{apart:.2g}: its attention is of a kind that cannot be converted"
            )
    read = [layer.get_seq_length() for layer in cache.layers]
    if read != [_CHECK_TOKENS] * len(read):
        raise ValueError(
            f"{name}: expected {_CHECK_TOKENS} tokens in the memory of every layer, found {read}: not all of "
            "its layers can be converted"
        )
