"""Rows of one cache with texts of different lengths, which can join and leave: for continuous batching.

`ovq.serve` builds on it, and it can be used without a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ovq.hf.cache import CACHE_KEY, StateCache
from ovq.hf.context import Context

if TYPE_CHECKING:
    from typing_extensions import Self

# A cache is shortened once it has more than twice the needed columns plus these: rarely enough that the cost
# is negligible, and so is the rounding of rotary keys.
_SPARE_COLUMNS = 64


class Rows:
    """Rows that decode together, each with its own text.

    All rows are in one cache, aligned at their ends; shorter ones are padded on the left. Padding is dropped
    as rows leave, so that memory and time depend on the remaining rows, not on how long the batch has been
    running.

    Args:
        model: an `OVQForCausalLM` or a converted model (`ovq.convert`), with its own device and dtype, in
            evaluation mode.
        cache: cache of the rows.
        lengths: number of tokens that each row has read, without padding.

    Example:
        >>> from ovq.hf import OVQConfig, OVQForCausalLM
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

    def __init__(self, model: Any, cache: StateCache, lengths: Sequence[int]) -> None:
        self.model, self.lengths = model, list(lengths)
        self._cache = cache

    def __repr__(self) -> str:
        return f"Rows(lengths={self.lengths}, columns={self._cache.get_seq_length()})"

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache of all rows."""
        return self._cache.nbytes

    @classmethod
    def start(cls, model: Any, context: Context | None = None) -> Self:
        """One row that has read nothing, or the document of a context (which is copied)."""
        if context is None:
            return cls(model, model.make_cache(), [0])
        return cls(model, context.cache(), [context.num_tokens])

    def read(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Read the next tokens of each row; call it without gradients.

        Args:
            tokens: `[B, T]` ids, equally many for every row.

        Returns:
            `[B, vocab_size]` logits of the next token, float32 or better.

        Raises:
            ValueError: if there are not as many rows of tokens.
        """
        ids = torch.as_tensor(tokens, dtype=torch.int64, device=self.model.device)
        if len(ids) != len(self):
            # A cache that has read nothing would take any number of rows, and lengths would not be theirs.
            raise ValueError(f"tokens: expected those of {len(self)} rows, found {len(ids)}")
        inputs = self.model.row_inputs(self._cache, self.lengths, ids.shape[1])
        output = self.model(ids, logits_to_keep=1, return_dict=True, **inputs, **{CACHE_KEY: self._cache})
        logits = output.logits[:, -1]
        self.lengths = [length + ids.shape[1] for length in self.lengths]
        self._drop_unneeded_columns()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of several parts, in order; each has read at least one token. The parts do not change.

        Raises:
            ValueError: if there are no parts.
        """
        if not parts:
            raise ValueError("parts: expected at least one, found none")
        caches = [part._cache for part in parts]
        joined = type(caches[0]).concatenate(caches)
        rows = cls(parts[0].model, joined, [length for part in parts for length in part.lengths])
        rows._drop_unneeded_columns()
        return rows

    def copied(self) -> Self:
        """An independent copy of the rows."""
        return type(self)(self.model, self._cache.snapshot(), self.lengths)

    def taken(self, place: int) -> Self:
        """An independent copy of the row at this place."""
        rows = type(self)(self.model, self._cache.selected([place]), [self.lengths[place]])
        rows._drop_unneeded_columns()
        return rows

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at these places, in this order; repeats are independent copies."""
        self._cache.batch_select_indices(torch.tensor(places, dtype=torch.int64, device="cpu"))
        self.lengths = [self.lengths[place] for place in places]
        self._drop_unneeded_columns()

    def _drop_unneeded_columns(self) -> None:
        """Shorten the cache if many of its columns are no longer needed."""
        if not self.lengths:
            return
        by_column = max(layer.num_by_column for layer in self._cache.layers)
        if self._cache.get_seq_length() > 2 * min(by_column, max(self.lengths)) + _SPARE_COLUMNS:
            self._cache.shorten(self.lengths)
