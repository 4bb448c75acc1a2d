"""A model of this library as the scheduler uses it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cached_property

import torch

from ovq.hf.context import Context, fingerprint, read_in_pieces
from ovq.hf.modeling_ovq import OVQForCausalLM
from ovq.hf.rows import Rows


class ServedModel:
    """An `OVQForCausalLM`, whatever its mixers, as a `BatchModel`.

    Args:
        model: On its device and in its dtype, in evaluation mode.
    """

    def __init__(self, model: OVQForCausalLM) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        """See `BatchModel.device`."""
        return self.model.device

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """That of the model. The first use takes seconds for a large one, so not in the engine's thread."""
        return fingerprint(self.model)

    def start(self, context: Context | None) -> Rows:
        """See `BatchModel.start`."""
        return Rows.start(self.model, context)

    def joined(self, parts: Sequence[Rows]) -> Rows:
        """See `BatchModel.joined`."""
        return Rows.joined(parts)

    def read_document(self, tokens: Sequence[int], piece: int) -> Generator[int, None, Context]:
        """See `BatchModel.read_document`."""
        return read_in_pieces(
            self.model, tokens, prefill_chunk_size=piece, known_fingerprint=self.fingerprint
        )
