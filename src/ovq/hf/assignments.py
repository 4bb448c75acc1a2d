"""`model_assignments`: the slot of each token of a text, in each OVQ layer of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ovq.hf.cache import one_cache
from ovq.hf.pretrained import OVQPreTrainedModel
from ovq.layers.ovq import RecordedCall
from ovq.ops import SlotAssignments


@torch.no_grad()
def model_assignments(
    model: OVQPreTrainedModel, input_ids: Tensor, **inputs: Any
) -> dict[int, SlotAssignments]:
    """Run a model on a text and return the slot of each token in each OVQ layer, by layer index.

    A token of a layer is the output of the layers below and of the short convolution at its position. With a
    convolution of 3 taps, the key and value of token t depend on the layer's inputs t - 2 to t.

    Args:
        model: an `OVQModel` or `OVQForCausalLM`.
        input_ids: `[B, T]`.
        inputs: other arguments of the model's backbone, such as `attention_mask`. A cache is updated, as in
            any call; the assignments are then of the new tokens only.

    Raises:
        ValueError: if the model has no OVQ layers, or cannot read these inputs.

    Example:
        >>> from ovq.hf import OVQConfig, OVQModel
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> found = model_assignments(OVQModel(config), torch.arange(300)[None] % 8)
        >>> config.mixer_types, list(found), found[1].slots.shape
        (['sliding_attention', 'ovq'], [1], torch.Size([1, 2, 300]))
        >>> print(found[1].state.summary())
        300 tokens seen, 44 pending; ...
    """
    cache = one_cache(inputs.get("past_key_values"), inputs.get("cache"))
    given = {"use_cache": False, **inputs}
    before = cache.snapshot() if cache is not None and cache.is_recording else None
    with recording(model) as calls:
        model.base_model(input_ids, **given)
    if before is not None and any(len(of_layer) > 1 for of_layer in calls.values()):
        # A cache that records reads long texts in two calls, each with assignments of its own tokens only.
        for layer in before.layers:
            layer.record_past = False
        with recording(model) as calls:
            model.base_model(input_ids, **given | {"past_key_values": before, "cache": None})
    return {i: of_layer[-1].assignments() for i, of_layer in calls.items()}


@contextmanager
def recording(model: OVQPreTrainedModel) -> Iterator[dict[int, list[RecordedCall]]]:
    """Context manager that records the op calls of each OVQ layer in a list, by layer index.

    Raises:
        ValueError: if the model has no OVQ layers.
    """
    with ExitStack() as stack:
        yield {i: stack.enter_context(layer.recording()) for i, layer in model.ovq_layers().items()}
