"""`inspect_text`: let a model read a text, and look into the memory of all its OVQ layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.assignments import recording
from ovq.inspect.layer import LayerMemory, layer_memory
from ovq.runtime.progress import AnyWork

MAX_TOKENS = 4096
"""Tokens of a text that are looked at unless told otherwise: as many as a page shows without waiting."""
MOST_TOKENS = 16_384
"""The most tokens that can be looked at."""
NUM_READS = 8
"""How many of the weights of each query are kept unless told otherwise."""

# Pages hold slots and places in a chunk as 16-bit numbers.
_LARGEST = 2**15 - 1


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class InspectedText:
    """A text, and what the OVQ layers of a model kept of it.

    Attributes:
        model: Name of the model.
        name: Name of the text.
        pieces: The text of each token.
        has_ids: Whether the pieces are token ids, as in models without a tokenizer.
        num_given: Tokens that the text had before it was cut.
        config: The model's config.
        layers: The memory of each OVQ layer, the lowest first.
    """

    model: str
    name: str
    pieces: Sequence[str]
    has_ids: bool
    num_given: int
    config: OVQConfig
    layers: Sequence[LayerMemory]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model has read."""
        return len(self.pieces)

    def layer(self, number: int | None) -> LayerMemory:
        """The memory of a layer by its number; of the highest OVQ layer for None.

        Raises:
            ValueError: If there is no OVQ layer of that number.
        """
        for memory in reversed(self.layers):
            if number is None or memory.layer == number:
                return memory
        numbers = ", ".join(str(memory.layer) for memory in self.layers)
        raise ValueError(f"expected an OVQ layer, one of {numbers}, found {number}")


@torch.no_grad()
def inspect_text(
    model: OVQForCausalLM,
    ids: Sequence[int],
    pieces: Sequence[str],
    *,
    model_name: str = "",
    name: str = "",
    has_ids: bool = False,
    max_tokens: int = MAX_TOKENS,
    num_reads: int = NUM_READS,
    work: AnyWork | None = None,
) -> InspectedText:
    """Let a model read the beginning of a text in one pass, and recount the memory of its OVQ layers.

    Args:
        model: Used on the device and in the dtype that it has; call `eval()` on it first.
        ids: Token ids.
        pieces: The text of each of them, see `token_pieces`.
        model_name: What to call the model. name: what to call the text.
        has_ids: Whether the pieces are token ids.
        max_tokens: Tokens to read; the rest of the text is left out, and `num_given` tells so.
        num_reads: How many of the weights of each query to keep.
        work: Is told how many tokens are done, summed over the OVQ layers.

    Raises:
        ValueError: If the model has no OVQ layers, or slots or chunks too many or large for a page, or
            there are no tokens, not as many pieces, or sizes out of bounds.

    Example:
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> found = inspect_text(OVQForCausalLM(config), [1, 2, 3] * 60, ["a", "b", "c"] * 60, max_tokens=150)
        >>> found.num_tokens, found.num_given, [memory.layer for memory in found.layers]
        (150, 180, [1])
    """
    if not ids or len(ids) != len(pieces):
        raise ValueError(
            f"expected at least one token and a piece for each, found {len(ids)} and {len(pieces)} pieces"
        )
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise ValueError(f"max_tokens: expected 1 to {MOST_TOKENS:,}, found {max_tokens}")
    config: Any = model.config
    for field in ("num_slots", "chunk_size"):
        if getattr(config, field) > _LARGEST:
            raise ValueError(f"{field}: expected at most {_LARGEST:,}, found {getattr(config, field):,}")
    shown = torch.tensor([list(ids[:max_tokens])], device=model.device)
    with recording(model) as calls:
        model.base_model(shown, use_cache=False)
    layers: list[LayerMemory] = []
    for number, of_layer in calls.items():
        done = len(layers) * shown.shape[1]

        def progress(num_tokens: int, done: int = done) -> None:
            if work is not None:
                work.update(done + num_tokens)

        layers.append(layer_memory(of_layer[-1], layer=number, num_reads=num_reads, progress=progress))
    return InspectedText(
        model=model_name,
        name=name,
        pieces=list(pieces[:max_tokens]),
        has_ids=has_ids,
        num_given=len(ids),
        config=config,
        layers=layers,
    )
