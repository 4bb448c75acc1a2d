"""`inspect_text`: run a model on a text, and inspect the memory of all its layers with slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ovq.hf import OVQForCausalLM
from ovq.hf.assignments import recording
from ovq.inspect.converted import converted_memories
from ovq.inspect.layer import layer_memory
from ovq.inspect.memory import DROPPED, LayerMemory
from ovq.inspect.sharing import LEVEL_NAMES
from ovq.prompts import check_ids
from ovq.runtime.progress import AnyWork

MAX_TOKENS = 4096
"""Default number of tokens to inspect, which a page shows without delay."""
MOST_TOKENS = 16_384
"""Largest number of tokens to inspect."""
NUM_READS = 8
"""Default number of attention weights to keep per query."""

# Pages store slots and places in a chunk as 16-bit numbers.
_LARGEST = 2**15 - 1


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class InspectedText:
    """A text, and what the layers of a model kept of it.

    Attributes:
        model: Name of the model.
        name: Name of the text.
        pieces: The text of each token.
        has_ids: Whether the pieces are token ids, as for models without a tokenizer.
        num_given: Number of tokens of the text before it was cut.
        merge: Update rule of the dictionaries.
        conv_size: Taps of the convolution before them; 0 for none.
        num_layers: Number of layers of the model.
        layers: The memory of each OVQ layer, or of each layer of a converted model, lowest first.
    """

    model: str
    name: str
    pieces: Sequence[str]
    has_ids: bool
    num_given: int
    merge: str
    conv_size: int
    num_layers: int
    layers: Sequence[LayerMemory]

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the model has read."""
        return len(self.pieces)

    @property
    def level_names(self) -> tuple[str, ...]:
        """`LEVEL_NAMES`, without that of dropped tokens if no head drops any."""
        has_dropped = any((memory.final_slots == DROPPED).any() for memory in self.layers)
        return LEVEL_NAMES if has_dropped else LEVEL_NAMES[:-1]

    def layer(self, number: int | None) -> LayerMemory:
        """The memory of the layer with this index; None for the highest one.

        Raises:
            ValueError: If there is no memory of that layer.
        """
        for memory in reversed(self.layers):
            if number is None or memory.layer == number:
                return memory
        numbers = ", ".join(str(memory.layer) for memory in self.layers)
        raise ValueError(f"expected an OVQ layer, one of {numbers}, found {number}")

    def reading_head(self, number: int | None) -> int:
        """The query head of a layer (see `layer`) whose queries read the most from slots."""
        return int(self.layer(number).shares[..., 1:].sum((1, 2)).argmax())


@torch.no_grad()
def inspect_text(
    model: Any,
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
    """Run a model on the beginning of a text in one pass; returns what its layers kept and read of it.

    Args:
        model: An `OVQForCausalLM`, or a model converted by `ovq.convert.attach`, with its own device and
            dtype; call `eval()` on it first.
        ids: Token ids.
        pieces: The text of each token, see `token_pieces`.
        model_name: Name of the model. name: Name of the text.
        has_ids: Whether the pieces are token ids.
        max_tokens: Most tokens to read; the rest of the text is left out (see `num_given`).
        num_reads: Number of largest attention weights to keep per query.
        work: Is told the number of tokens done, summed over the layers.

    Raises:
        ValueError: If the model is of neither kind or has no OVQ layers, has too many slots or too large
            chunks for a page, or there are no tokens, not as many pieces, or ids or sizes out of bounds.

    Example:
        >>> from ovq.hf import OVQConfig
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> found = inspect_text(OVQForCausalLM(config), [1, 2, 3] * 60, ["a", "b", "c"] * 60, max_tokens=150)
        >>> found.num_tokens, found.num_given, [memory.layer for memory in found.layers]
        (150, 180, [1])
    """
    if len(ids) == 0 or len(ids) != len(pieces):
        raise ValueError(
            f"expected at least one token and a piece for each, found {len(ids)} and {len(pieces)} pieces"
        )
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise ValueError(f"max_tokens: expected 1 to {MOST_TOKENS:,}, found {max_tokens}")
    is_own = isinstance(model, OVQForCausalLM)
    config: Any = model.config if is_own else getattr(model, "memory_config", None)
    if config is None:
        raise ValueError(
            "expected an OVQForCausalLM or a model converted by ovq.convert.attach, found "
            f"{type(model).__name__}"
        )
    most_slots = config.num_slots if is_own else max(map(max, config.num_slots))
    for field, found in (("num_slots", most_slots), ("chunk_size", config.chunk_size)):
        if found > _LARGEST:
            raise ValueError(f"{field}: expected at most {_LARGEST:,}, found {found:,}")
    check_ids(ids, vocab_size=model.get_input_embeddings().num_embeddings, name="ids")
    shown = torch.tensor([list(ids[:max_tokens])], device=model.device)
    report = None if work is None else work.update
    if is_own:
        layers = _own_memories(model, shown, num_reads, report)
    else:
        layers = converted_memories(model, shown, num_reads=num_reads, progress=report)
    return InspectedText(
        model=model_name,
        name=name,
        pieces=list(pieces[:max_tokens]),
        has_ids=has_ids,
        num_given=len(ids),
        merge=config.merge,
        conv_size=config.conv_size if is_own else 0,
        num_layers=model.config.num_hidden_layers,
        layers=layers,
    )


def _own_memories(
    model: OVQForCausalLM, ids: torch.Tensor, num_reads: int, report: Callable[[int], None] | None
) -> list[LayerMemory]:
    """The memory of each OVQ layer of a model that reads `ids` `[1, T]`."""
    with recording(model) as calls:
        model.base_model(ids, use_cache=False)
    layers: list[LayerMemory] = []
    for number, of_layer in calls.items():
        done = len(layers) * ids.shape[1]
        progress = None if report is None else lambda num_tokens, done=done: report(done + num_tokens)
        layers.append(layer_memory(of_layer[-1], layer=number, num_reads=num_reads, progress=progress))
    return layers
