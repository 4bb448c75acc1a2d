"""Tiny random models of each architecture that is said to work."""

import copy
import functools
import inspect

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama

from ovq.convert import attach

#: The library `kernels` makes modules of transformers' functions; models that have them cannot be pickled.
CAN_BE_PICKLED = inspect.isfunction(modeling_llama.apply_rotary_pos_emb)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # Attention of randomly initialised models is nearly uniform; this makes it sharper.
    "initializer_range": 0.3,
    # Most texts of these tests are longer, so that rows are re-positioned.
    "max_position_embeddings": 48,
}
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
}
# Heads with different budgets in one layer, one of them without slots.
MEMORY = {
    "num_slots": [[16, 0], [8, 16]],
    "window": [[16, 24], [16, 16]],
    "num_sinks": 2,
    "chunk_size": 8,
    "max_distance": 40,
}


@functools.cache
def _original(kind):
    config, model, fields = KINDS[kind]
    torch.manual_seed(0)
    return model(config(**SIZES, **fields)).eval()


def original(kind="llama"):
    return copy.deepcopy(_original(kind))


def converted(kind="llama", **memory):
    return attach(original(kind), **{**MEMORY, **memory})


def tokens(*shape, seed=0):
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


IDS = tokens(5, 100)


def read(model, ids, *, start=20):
    """Logits of all tokens from `start` on, one by one, and the cache."""
    cache = model.make_cache()
    with torch.no_grad():
        logits = [model(ids[:, :start], past_key_values=cache).logits[:, :0]]
        for i in range(start, ids.shape[1]):
            logits.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(logits, 1), cache
