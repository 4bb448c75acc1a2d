"""`ServedModel`: what a server needs from a model."""

from __future__ import annotations

import json
from collections.abc import Generator, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ovq.hf.context import Context, load_context, read_in_pieces
from ovq.hf.context_file import fingerprint
from ovq.hf.rows import Rows


class ServedModel:
    """An `OVQForCausalLM`, with any mixers, or a converted model, for a server.

    Other models can be served by a class with the same methods, if rows of their caches can be selected and
    concatenated.

    Args:
        model: The model, on its device and in its dtype, in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def device(self) -> torch.device:
        """Device of the logits, on which tokens are sampled."""
        return self.model.device

    @property
    def settings(self) -> Hashable:
        """Settings that states depend on besides tokens, and that may change while the model is served."""
        has_adapters = getattr(self.model, "_hf_peft_config_loaded", False)
        adapters = self.model.active_adapters() if has_adapters else []
        is_converted = hasattr(self.model, "memory_config")
        return self._fixed_fields if is_converted else json.dumps(self.model.memory_fields()), *adapters

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary: token ids are smaller."""
        return self.model.config.vocab_size

    @property
    def ends(self) -> frozenset[int]:
        """End tokens."""
        found = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset([] if found is None else [found] if isinstance(found, int) else found)

    @cached_property
    def _fixed_fields(self) -> str:
        """Fields of the memory of a converted model, which are many and do not change."""
        return json.dumps(self.model.memory_fields())

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return fingerprint(self.model)

    def prepare(self) -> None:
        """Do the one-time work before documents are read, which reads all weights. Thread-safe."""
        _ = self._fingerprint

    def load_context(self, path: Path) -> Context:
        """The context in a file; ValueError, naming the path, if it is not of this model. Thread-safe."""
        return load_context(path, self.model, known_fingerprint=self._fingerprint)

    def start(self, context: Context | None) -> Rows:
        """One row that has read nothing, or the context."""
        return Rows.start(self.model, context)

    def joined(self, parts: Sequence[Rows]) -> Rows:
        """The rows of all parts, in order; the parts are not used again."""
        return Rows.joined(parts)

    def read_document(self, tokens: Sequence[int], piece: int) -> Generator[int, None, Context]:
        """Read a document in pieces of `piece` tokens; yields the tokens read so far, returns the context."""
        return read_in_pieces(
            self.model, tokens, prefill_chunk_size=piece, known_fingerprint=self._fingerprint
        )
