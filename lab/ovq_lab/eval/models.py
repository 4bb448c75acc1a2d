"""Uniform access to language models under evaluation: of this library, converted, or pretrained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from ovq.convert import ConvertedMixin
from ovq.convert.config import CONFIG_KEY
from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.cache import CACHE_KEY, StateCache
from ovq_lab.eval.dictionaries import Dictionary

CONVERTED = "converted"
"""Stands in place of a mixer's name for a model that `ovq convert` has written."""

PRETRAINED = "pretrained"
"""The same for an unchanged model of transformers, whose cache grows."""

_CHECK_TOKENS = 4
_TOLERANCE = 0.05


def long_range_mixer(config: PreTrainedConfig) -> str:
    """Name of the model's last mixer that is not a sliding window, or of the window if it has no other;
    `"converted"` or `"pretrained"` for models that are not of this library.

    Example:
        >>> from transformers import LlamaConfig
        >>> long_range_mixer(OVQConfig(num_hidden_layers=2, mixer_types=["sliding_attention", "ovq"]))
        'ovq'
        >>> long_range_mixer(LlamaConfig())
        'pretrained'
    """
    if not isinstance(config, OVQConfig):
        return CONVERTED if hasattr(config, CONFIG_KEY) else PRETRAINED
    others = [name for name in config.mixer_types if name != "sliding_attention"]
    return others[-1] if others else config.mixer_types[-1]


def new_cache(model: PreTrainedModel) -> Any:
    """An empty cache for the model; a `DynamicCache` for models of transformers."""
    make_cache = getattr(model, "make_cache", None)
    return DynamicCache(config=model.config) if make_cache is None else make_cache()


def branch(cache: Any) -> Any:
    """An independent copy of a cache."""
    return cache.snapshot() if isinstance(cache, StateCache) else copy.deepcopy(cache)


@torch.no_grad()
def state_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Bytes of the cache of one row after `num_tokens` tokens."""
    if isinstance(model, OVQForCausalLM):
        return model.state_bytes(num_tokens)
    cache = new_cache(model)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    model.base_model(token, **{CACHE_KEY: cache})
    if isinstance(cache, StateCache):
        return cache.nbytes
    total = 0
    for layer in cache.layers:
        # A window keeps at most its size.
        most = getattr(layer, "sliding_window", None) or num_tokens
        per_token = sum(x.nbytes for x in vars(layer).values() if isinstance(x, torch.Tensor))
        total += per_token * min(num_tokens, most)
    return total


def row_fields(model: PreTrainedModel, dictionary: Dictionary, length: int) -> dict[str, Any]:
    """The fields of a `ModelRow` for a model with this dictionary."""
    state_dtype = getattr(model.config, "state_dtype", None)
    return {
        "mixer": long_range_mixer(model.config),
        "num_slots": dictionary.num_slots,
        "merge": dictionary.merge,
        "logn_length": getattr(model.config, "logn_length", None),
        "state_dtype": None if dictionary.num_slots is None or state_dtype == "float32" else state_dtype,
        "length": length,
        "state_bytes": state_bytes(model, length),
    }


def chunk_size_of(model: PreTrainedModel) -> int:
    """Tokens per chunk, which are merged at a time. For models without chunks it is the default of
    `OVQConfig`, so that they can be measured in the same way."""
    if isinstance(model, ConvertedMixin):
        return model.memory_config.chunk_size
    return model.config.chunk_size if isinstance(model.config, OVQConfig) else OVQConfig().chunk_size


@torch.no_grad()
def check_logits(model: PreTrainedModel) -> None:
    """Raise ValueError unless logits equal the output layer applied to the last hidden states.

    Evaluation computes them so, for a few tokens at a time. Some models scale or cap them afterwards.
    """
    name, output = type(model).__name__, model.get_output_embeddings()
    if (found := getattr(model.config, "final_logit_softcapping", None)) is not None:
        raise ValueError(f"{name}: expected final_logit_softcapping None in its config, found {found}")
    if output is None or not isinstance(getattr(model.config, "vocab_size", None), int):
        raise ValueError(f"{name}: expected a model of text with an output layer, found none")
    ids = torch.arange(_CHECK_TOKENS, device=model.device)[None] % model.config.vocab_size
    expected = model(ids, use_cache=False).logits.float()
    plain = output(model.base_model(ids, use_cache=False).last_hidden_state).float()
    # Of a model that has diverged, both are NaN, and so is its loss.
    is_nan = plain.isnan() & expected.isnan()
    difference = float((plain - expected).abs().masked_fill(is_nan, 0).max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"{name}: expected logits equal to those of its output layer, found a "
            f"difference of {difference:.2g}: such models cannot be tested here"
        )
