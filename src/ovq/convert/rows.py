"""Rows of a converted model, at different places of different texts: they read together, join and leave.

What `ovq.hf.rows` is for models of this library. No row needs padding: each has a memory of its own, of
constant size, and its positions go on from its own length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.cache import MemoryCache
from ovq.hf.cache import CACHE_KEY
from ovq.hf.rows import Rows


class ConvertedRows(Rows):
    """The rows that decode together, each with a text of its own; see `ovq.hf.rows.Rows`.

    Args:
        model: a converted model, on the device and in the dtype that it has, in evaluation mode.
        cache: what the rows have read.
        lengths: tokens that each row has read.

    Attributes:
        lengths: the same, as they are now.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ovq.convert import attach
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
        >>> model = attach(model, num_slots=8, window=16, chunk_size=8)
        >>> one, two = ConvertedRows.start(model), ConvertedRows.start(model)
        >>> with torch.no_grad():
        ...     _ = one.read([[1, 2, 3]]), two.read([[4]])
        ...     rows = ConvertedRows.joined([one, two])
        ...     rows.read([[5], [6]]).shape
        torch.Size([2, 32])
        >>> rows.keep([1])
        >>> rows
        ConvertedRows(lengths=[2])
    """

    model: Any  # type: ignore[assignment]  # the base class has a model of this library
    _cache: MemoryCache  # type: ignore[assignment]  # and its cache

    def __repr__(self) -> str:
        return f"ConvertedRows(lengths={self.lengths})"

    @staticmethod
    def _new_cache(model: Any) -> MemoryCache:  # type: ignore[override]  # likewise
        return model.make_cache()

    @staticmethod
    def _joined_cache(caches: Sequence[MemoryCache], model: Any) -> MemoryCache:  # type: ignore[override]
        return MemoryCache.concatenate(caches)

    def _logits(self, ids: Tensor) -> Tensor:
        first = torch.tensor(self.lengths, device=ids.device)[:, None]
        places = first + torch.arange(ids.shape[1], device=ids.device)
        # By the whole model, as some models change what their output layer gives.
        output = self.model(ids, position_ids=places, logits_to_keep=1, **{CACHE_KEY: self._cache})
        return output.logits[:, -1]

    def _tidy(self) -> None:
        """A memory of constant size has nothing to shorten."""
