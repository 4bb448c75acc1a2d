"""Models as the server uses them: those of this library, converted ones, and what any other must provide."""

from __future__ import annotations

import json
from collections.abc import Generator, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ovq.hf.context import Context, load_context, read_in_pieces
from ovq.hf.context_file import fingerprint
from ovq.hf.rows import Rows


class BatchRows(Protocol):
    """Rows that read together, such as `ovq.hf.rows.Rows`."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for all rows."""

    def read(self, tokens: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Read `[B, T]` tokens; returns the logits `[B, vocab_size]` of the next ones."""

    def keep(self, places: Sequence[int]) -> None:
        """Keep the rows at these places, in this order, repeats allowed."""

    def copied(self) -> BatchRows:
        """The same rows, which go on by themselves."""

    def taken(self, place: int) -> BatchRows:
        """The row at this place alone, which goes on by itself."""


class AnyServedModel(Protocol):
    """What a server needs of a model; `ServedModel` has it for those of this library.

    A model of another kind can be served if rows of its cache can be selected and concatenated.
    """

    @property
    def device(self) -> torch.device:
        """Where random numbers are drawn."""

    @property
    def settings(self) -> Hashable:
        """What states depend on beside tokens, as far as it may change while the model is served."""

    def start(self, context: Context | None) -> BatchRows:
        """One row that has read nothing, or a context."""

    def joined(self, parts: Sequence[Any]) -> BatchRows:
        """The rows of several in one, in their order; the parts are not used again."""

    def read_document(self, tokens: Sequence[int], piece: int) -> Generator[int, None, Context]:
        """Read a document in pieces of so many tokens; yields the tokens read so far, returns the context."""

    @property
    def vocab_size(self) -> int:
        """Token ids are smaller."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end a text."""

    def prepare(self) -> None:
        """Do what must be done once before documents are read, which may take seconds; in any thread."""

    def load_context(self, path: Path) -> Context:
        """The context in a file, in any thread; ValueError, which names the path, if it is none of this
        model."""


class ServedModel:
    """An `OVQForCausalLM`, whatever its mixers, or a converted model, for a server.

    Args:
        model: On its device and in its dtype, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        # Of a converted model, whose fields are many and fixed.
        self._known_fields: tuple[Any, str] = None, ""

    @property
    def device(self) -> torch.device:
        """See `AnyServedModel.device`."""
        return self.model.device

    @property
    def settings(self) -> Hashable:
        """See `AnyServedModel.settings`."""
        has_adapters = getattr(self.model, "_hf_peft_config_loaded", False)
        adapters = self.model.active_adapters() if has_adapters else []
        config = getattr(self.model, "memory_config", None)
        if config is None or config is not self._known_fields[0]:
            self._known_fields = config, json.dumps(self.model.memory_fields())
        return self._known_fields[1], *adapters

    @property
    def vocab_size(self) -> int:
        """See `AnyServedModel.vocab_size`."""
        return self.model.config.vocab_size

    @property
    def ends(self) -> frozenset[int]:
        """See `AnyServedModel.ends`."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset([] if found is None else [found] if isinstance(found, int) else found)

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(self.model)

    def prepare(self) -> None:
        """Read all weights once, for the fingerprint that contexts have."""
        _ = self._fingerprint

    def load_context(self, path: Path) -> Context:
        """See `AnyServedModel.load_context`."""
        return load_context(path, self.model)

    def start(self, context: Context | None) -> Rows:
        """See `AnyServedModel.start`."""
        return Rows.start(self.model, context)

    def joined(self, parts: Sequence[Rows]) -> Rows:
        """See `AnyServedModel.joined`."""
        return Rows.joined(parts)

    def read_document(self, tokens: Sequence[int], piece: int) -> Generator[int, None, Context]:
        """See `AnyServedModel.read_document`."""
        return read_in_pieces(
            self.model, tokens, prefill_chunk_size=piece, known_fingerprint=self._fingerprint
        )
