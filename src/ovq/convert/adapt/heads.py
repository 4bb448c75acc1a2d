"""Stage 1: every layer by itself learns to give the outputs that its attention gave with all tokens.

One pass of the original model over a text gives the queries, keys and values of every layer, and the outputs
to be matched. The memory reads the same keys and values beside it. What is learned has no part in what is
merged, so its gradient is exact, and nothing goes through the rest of the model.

Source: attention transfer of LoLCATs (arXiv 2410.10254), for a memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from ovq.convert.adapt.reading import SlotReading
from ovq.convert.attach import original_attention
from ovq.convert.cache import MemoryCache
from ovq.hf.cache import CACHE_KEY

_IMPLEMENTATION = "ovq_adapt_heads"
_COMPARED = "_ovq_compared"


class HeadErrors:
    """The errors of the layers on sequences that are read piece by piece.

    Args:
        model: a converted model.
        reading: what is learned; gradients of the errors are added to its own.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ovq.convert import attach
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2)
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
        >>> model = attach(model, num_slots=4, window=8, chunk_size=8)
        >>> reading = SlotReading(model.memory_config, 2)
        >>> errors = HeadErrors(model, reading)
        >>> errors.start(0), errors.add(torch.arange(64)[None] % 32) > 0
        (None, True)
        >>> reading.bias.grad.shape
        torch.Size([2, 2])
    """

    def __init__(self, model: Any, reading: SlotReading) -> None:
        self._model, self._reading = model, reading

    def start(self, number: int) -> None:
        """Begin new sequences, whose memories are empty; their `number` in the run does not matter here."""
        self._memory = MemoryCache(self._model.memory_config)
        self._all_tokens = DynamicCache(config=self._model.config)

    @torch.no_grad()
    def add(self, ids: Tensor) -> float:
        """Read the next piece `[B, T]` of the sequences.

        Returns:
            The mean over the layers of the squared error, relative to the outputs' own squares.
        """
        with torch.enable_grad():
            self._reading.put_into(self._memory)
        found = _Compared(self._memory)
        with original_attention(self._model, _IMPLEMENTATION):
            _set(self._model, found)
            try:
                self._model.base_model(ids, **{CACHE_KEY: self._all_tokens}, use_cache=True)
            finally:
                _set(self._model, None)
        return sum(found.errors) / len(found.errors)


class _Compared:
    """What the attention function compares in one pass."""

    def __init__(self, memory: MemoryCache) -> None:
        self.memory = memory
        self.errors: list[float] = []

    def add(self, module: Any, q: Tensor, k: Tensor, v: Tensor, exact: Tensor) -> None:
        """Compare the outputs `exact` `[B, H, T, V]` of a layer with those of its memory."""
        layer = self.memory.layers[module.layer_idx]
        project = getattr(module, "o_proj", None) or (lambda x: x)
        with torch.enable_grad():
            found = layer.attend(q, k, v, None)
            difference, wanted = (
                project(x.transpose(1, 2).flatten(2)).float() for x in (found - exact, exact)
            )
            error = difference.square().sum() / wanted.square().sum().clamp(min=1e-12)
            if error.requires_grad:
                error.backward()
        layer.detach_()
        self.errors.append(float(error.detach()))


def _set(model: Any, compared: _Compared | None) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            setattr(module, _COMPARED, compared)


def _attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    num, total = q.shape[2], k.shape[2]
    scale = q.shape[3] ** -0.5 if scaling is None else scaling
    places = torch.arange(total, device=q.device)
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=places <= places[total - num :, None], scale=scale, enable_gqa=True
    )
    getattr(module, _COMPARED).add(module, q * scale, k[:, :, -num:], v[:, :, -num:], o)
    return o.transpose(1, 2), None


AttentionInterface.register(_IMPLEMENTATION, _attention)
# The function above makes its own.
AttentionMaskInterface.register(_IMPLEMENTATION, lambda *args, **kwargs: None)
