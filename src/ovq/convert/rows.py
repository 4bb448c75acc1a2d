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
from ovq.convert.context import ConvertedContext
from ovq.hf.cache import CACHE_KEY


class ConvertedRows:
    """The rows that decode together, each with a text of its own.

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

    def __init__(self, model: Any, cache: MemoryCache, lengths: Sequence[int]) -> None:
        self.model, self.lengths = model, list(lengths)
        self._cache = cache

    def __repr__(self) -> str:
        return f"ConvertedRows(lengths={self.lengths})"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for all rows."""
        return self._cache.nbytes

    @classmethod
    def start(cls, model: Any, context: ConvertedContext | None = None) -> ConvertedRows:
        """One row that has read nothing yet, or the document of a context, which does not change."""
        if context is None:
            return cls(model, model.make_cache(), [0])
        return cls(model, context.cache(), [context.num_tokens])

    def read(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Read the next tokens of each row; call it without gradients.

        Args:
            tokens: `[B, T]` ids, equally many for every row.

        Returns:
            `[B, vocab_size]` logits of the token after them, float32 or better.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.model.device)
        first = torch.tensor(self.lengths, device=ids.device)[:, None]
        places = first + torch.arange(ids.shape[1], device=ids.device)
        # By the whole model, as some models change what their output layer gives.
        output = self.model(ids, position_ids=places, logits_to_keep=1, **{CACHE_KEY: self._cache})
        self.lengths = [length + ids.shape[1] for length in self.lengths]
        logits = output.logits[:, -1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @staticmethod
    def joined(parts: Sequence[ConvertedRows]) -> ConvertedRows:
        """The rows of several in one, in their order; each has read at least one token. The parts do not
        change."""
        cache = MemoryCache.concatenate([part._cache for part in parts])
        return ConvertedRows(parts[0].model, cache, [length for part in parts for length in part.lengths])

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at these places, in this order; repeats are copies that go on independently."""
        self._cache.batch_select_indices(torch.tensor(places, dtype=torch.int64))
        self.lengths = [self.lengths[place] for place in places]
