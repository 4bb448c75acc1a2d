"""Rows of one cache that are at different places of different texts: they read together, join and leave.

This is what continuous batching needs of a model. `ovq.serve` builds on it, and it can be used without a
server:

    rows = Rows.start(model, tokens)
    other = Rows.start(model, other_tokens, context=book)
    rows = Rows.joined([rows, other])
    logits = rows.read([[next_token], [other_next_token]])
    rows.keep([1])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ovq.hf.cache import OVQCache
from ovq.hf.context import Context
from ovq.hf.modeling_ovq import OVQForCausalLM

if TYPE_CHECKING:
    from typing_extensions import Self

# Columns by which a cache may exceed twice what is needed of it, before it is shortened: seldom enough to
# cost nothing, and to round rotated keys only now and then.
_SPARE_COLUMNS = 64


class Rows:
    """The rows that decode together, each with a text of its own.

    All rows are in one `OVQCache`, aligned at their ends; shorter ones are padded on the left. The padding is
    dropped again as rows leave, so that memory and time depend on the rows that are left, and not on how long
    the batch has been running.

    Args:
        model: used on the device and in the dtype that it has, in evaluation mode.
        cache: what the rows have read.
        lengths: tokens that each row has read, not counting padding.

    Attributes:
        lengths: the same, as they are now.

    Example:
        >>> from ovq.hf import OVQConfig
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = OVQForCausalLM(config).eval()
        >>> one, two = Rows.start(model), Rows.start(model)
        >>> with torch.no_grad():
        ...     _ = one.read([[1, 2, 3]]), two.read([[4]])
        ...     rows = Rows.joined([one, two])
        ...     rows.read([[5], [6]]).shape
        torch.Size([2, 8])
        >>> rows.lengths
        [4, 2]
        >>> rows.keep([1])
        >>> rows
        Rows(lengths=[2], columns=4)
    """

    def __init__(self, model: OVQForCausalLM, cache: OVQCache, lengths: Sequence[int]) -> None:
        self.model, self.lengths = model, list(lengths)
        self._cache = cache

    def __repr__(self) -> str:
        return f"Rows(lengths={self.lengths}, columns={self._cache.get_seq_length()})"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for all rows."""
        return self._cache.nbytes

    @classmethod
    def start(cls, model: OVQForCausalLM, context: Context | None = None) -> Self:
        """One row that has read nothing yet, or the document of a context, which does not change."""
        if context is None:
            return cls(model, cls._new_cache(model), [0])
        return cls(model, context.cache(), [context.num_tokens])

    def read(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Read the next tokens of each row; call it without gradients.

        Args:
            tokens: `[B, T]` ids, equally many for every row.

        Returns:
            `[B, vocab_size]` logits of the token after them, float32 or better.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.model.device)
        logits = self._logits(ids)
        self.lengths = [length + ids.shape[1] for length in self.lengths]
        self._tidy()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several in one, in their order; each has read at least one token. The parts do not
        change."""
        model = parts[0].model
        cache = cls._joined_cache([part._cache for part in parts], model)
        rows = cls(model, cache, [length for part in parts for length in part.lengths])
        rows._tidy()
        return rows

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at these places, in this order; repeats are copies that go on independently."""
        self._cache.batch_select_indices(torch.tensor(places, dtype=torch.int64))
        self.lengths = [self.lengths[place] for place in places]
        self._tidy()

    @staticmethod
    def _new_cache(model: OVQForCausalLM) -> OVQCache:
        """The cache of a row that has read nothing."""
        return OVQCache(model.config)

    @staticmethod
    def _joined_cache(caches: Sequence[OVQCache], model: OVQForCausalLM) -> OVQCache:
        """The rows of several caches in one."""
        return OVQCache.concatenate(caches, model.config)

    def _logits(self, ids: Tensor) -> Tensor:
        """Read `ids` `[B, T]`: `[B, vocab_size]` logits after the last one."""
        hidden = self.model.base_model(ids, self._mask(ids.shape[1]), past_key_values=self._cache)
        return self.model.get_output_embeddings()(hidden.last_hidden_state[:, -1])

    def _tidy(self) -> None:
        """Shorten the cache if much of it is no longer needed."""
        if not self.lengths:
            return
        by_column = max(layer.num_by_column for layer in self._cache.layers)
        if self._cache.get_seq_length() > 2 * min(by_column, max(self.lengths)) + _SPARE_COLUMNS:
            self._cache.shorten(self.lengths)

    def _mask(self, num_new: int) -> Tensor | None:
        """The mask `[B, P + T]` over cached and new columns; None if no column is padding."""
        num_columns = self._cache.get_seq_length()
        is_padded = self._cache.layers[0].has_padding
        if not is_padded and min(self.lengths) >= num_columns:
            return None
        num_real = torch.tensor(self.lengths, device=self.model.device)[:, None]
        column = torch.arange(num_columns + num_new, device=self.model.device)
        return (column >= num_columns - num_real).long()
