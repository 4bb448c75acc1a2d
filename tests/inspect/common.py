"""Texts and models to look into."""

import numpy as np
import torch

from ovq.inspect import DROPPED, inspect_text
from ovq.layers import OVQAttention
from tests.tiny import tiny_model


def recorded(num_tokens, *, seed=0, **options):
    """A call of a layer with random weights on a random text, and what the op made of it."""
    torch.manual_seed(seed)
    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "num_slots": 7, "chunk_size": 5}
    layer = OVQAttention(24, **sizes | options)
    if layer.merge_gate is not None:
        # As after training, where tokens count differently.
        torch.nn.init.normal_(layer.merge_gate.weight, 0.7, 0.3)
    if layer.forget_gate is not None:
        torch.nn.init.normal_(layer.forget_gate.weight, 0, 0.3)
    with layer.recording() as calls, torch.no_grad():
        layer(torch.randn(1, num_tokens, 24))
    return calls[0]


def kept_by_hand(values, slots):
    """What the slots `[T]` of a head give back of the values `[T, V]` of its tokens."""
    values, found = values.double().numpy(), []
    spread = ((values - values.mean(0)) ** 2).sum(-1)
    for token, slot in enumerate(slots):
        mean = values[slots == slot].mean(0) if slot >= 0 else values[token]
        found.append(max(0, 1 - ((values[token] - mean) ** 2).sum() / spread[token]))
    return np.where(slots == DROPPED, 0, found)


def looked_into(
    pieces, *, num_heads=2, num_kv_heads=None, max_tokens=4096, num_reads=8, work=None, **changes
):
    """A text of these pieces, read by a tiny model with random weights."""
    fields = {"vocab_size": 48, "hidden_size": 24, "num_attention_heads": num_heads}
    fields |= {"num_key_value_heads": num_kv_heads or num_heads}
    fields |= {"num_slots": 8, "chunk_size": 4, "initializer_range": 0.5}
    return inspect_text(
        tiny_model(**fields | changes),
        [17 * i % 48 for i in range(len(pieces))],
        pieces,
        model_name="tiny",
        name="text",
        max_tokens=max_tokens,
        num_reads=num_reads,
        work=work,
    )
