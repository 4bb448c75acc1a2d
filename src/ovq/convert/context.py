"""Contexts of converted models: a document is read once, and any number of prompts follow it.

The functions are those of `ovq.hf.context`, for models of `attach`:

    context = build_context(model, document_ids)
    save_context(context, "book.ctx")
    context = load_context("book.ctx", model)
    model.generate(**context.inputs([question_ids, other_question_ids]), max_new_tokens=32)
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.convert.cache import MemoryCache
from ovq.convert.config import MemoryConfig
from ovq.hf.cache import CACHE_KEY
from ovq.hf.context import (
    Context,
    check_content,
    checked_ids,
    digest,
    of_layer,
    read_to_the_end,
    weights_of,
)
from ovq.ops.serialization import positive_int, read_file, write_file

FORMAT = "ovq-converted-context"
VERSION = "2"


class ConvertedContext(Context):
    """The memory of a document, as a converted model keeps it; see `ovq.hf.Context`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ovq.convert import attach
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> model = attach(LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval(), num_slots=8)
        >>> context = build_context(model, torch.arange(300) % 32)
        >>> context.num_tokens
        300
        >>> inputs = context.inputs([[1, 2, 3], [4]])
        >>> model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0).shape
        torch.Size([2, 8])
    """

    _cache: MemoryCache  # type: ignore[assignment]  # the base class has another

    def cache(self, num_rows: int = 1) -> MemoryCache:  # type: ignore[override]  # likewise
        """A cache of rows that have each read the document; see `ovq.hf.Context.cache`."""
        found: Any = super().cache(num_rows)
        return found

    def inputs(self, prompts: Tensor | Sequence[Tensor | Sequence[int]]) -> dict[str, Any]:
        """The arguments of `generate` for prompts that follow the document; see `ovq.hf.Context.inputs`."""
        found: dict[str, Any] = super().inputs(prompts)
        mask = found["attention_mask"]
        # Padding may be anywhere, so it stays where it is: between the document and a short prompt.
        return {**found, "attention_mask": mask.roll(self.num_tokens, dims=1)}

    def _read(self, rows: list[Tensor]) -> MemoryCache:  # type: ignore[override]  # likewise
        return self.cache(len(rows))


@torch.no_grad()
def build_context(
    model: Any,
    input_ids: Tensor | Sequence[int],
    *,
    prefill_chunk_size: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> ConvertedContext:
    """Read a document with a converted model.

    Args:
        model: a converted model.
        input_ids: `[T]` or `[1, T]` token ids of the document.
        prefill_chunk_size: tokens per forward pass, which bounds the memory needed.
        progress: called with the number of tokens read so far, after each piece.

    Raises:
        ValueError: an empty document, ids that the model does not know, or `prefill_chunk_size` below 1.
    """
    reading = read_in_pieces(model, input_ids, prefill_chunk_size=prefill_chunk_size)
    return read_to_the_end(reading, progress)


def read_in_pieces(
    model: Any,
    input_ids: Tensor | Sequence[int],
    *,
    prefill_chunk_size: int = 2048,
    known_fingerprint: Mapping[str, str] | None = None,
) -> Generator[int, None, ConvertedContext]:
    """What `build_context` does, piece by piece; see `ovq.hf.context.read_in_pieces`."""
    if prefill_chunk_size < 1:
        raise ValueError(f"prefill_chunk_size: expected at least 1, found {prefill_chunk_size}")
    ids = checked_ids(input_ids, model, what="input_ids")
    cache = model.make_cache()
    num_read = 0
    for piece in ids.split(prefill_chunk_size):
        model.base_model(piece[None], **{CACHE_KEY: cache})
        num_read += len(piece)
        yield num_read
    own = fingerprint(model) if known_fingerprint is None else known_fingerprint
    return ConvertedContext(model=model, num_tokens=num_read, fingerprint=own, _cache=cache)


def save_context(context: ConvertedContext, path: str | os.PathLike) -> None:
    """Write a context to one safetensors file, completely or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {
        f"layers.{i}.{name}": tensor.contiguous()
        for i, layer in enumerate(context._cache.layers)
        for name, tensor in layer.tensors().items()
    }
    metadata = {"format": FORMAT, "version": VERSION, "num_tokens": str(context.num_tokens)}
    write_file(path, tensors, metadata={**metadata, **context.fingerprint, "content": digest(tensors)})


@torch.no_grad()
def load_context(path: str | os.PathLike, model: Any) -> ConvertedContext:
    """Read a context for the model that made it, onto the model's device.

    Raises:
        ValueError: a missing or damaged file, a file of another kind, or a context of another model or
            memory.
    """
    what = "a context of a converted model"
    metadata, tensors = read_file(path, what=what, file_format=FORMAT, version=VERSION)
    num_tokens = positive_int(path, metadata, "num_tokens")
    own = fingerprint(model)
    for name, expected in own.items():
        if metadata.get(name) != expected:
            raise ValueError(
                f"{path}: expected a context of this very model and memory ({name} {expected:.100}), "
                f"found {metadata.get(name, 'none'):.100}"
            )
    check_content(path, metadata, tensors)
    cache = model.make_cache()
    # An empty memory of one row shows which tensors there must be.
    model.base_model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), **{CACHE_KEY: cache})
    for i, layer in enumerate(cache.layers):
        layer_tensors = of_layer(tensors, i)
        wanted, found = (
            {name: (tuple(t.shape), t.dtype) for name, t in some.items()}
            for some in (layer.tensors(), layer_tensors)
        )
        if found != wanted:
            raise ValueError(f"{path}: layer {i}: expected tensors {wanted}, found {found}")
        layer.restore(layer_tensors, num_tokens)
    return ConvertedContext(model=model, num_tokens=num_tokens, fingerprint=own, _cache=cache)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ConvertedContextInfo:
    """What a saved context of a converted model is and holds.

    Attributes:
        num_tokens: tokens of the document.
        nbytes: bytes of all tensors.
        dtype: of the model.
        weights: SHA-256 of the model's weights.
        config: the memory of the model.
        counts: per layer, how many tokens each slot in use holds, those of all its heads one after the other.
        layer_bytes: per layer, the bytes of its tensors.
    """

    num_tokens: int
    nbytes: int
    dtype: str
    weights: str
    config: MemoryConfig
    counts: list[Tensor]
    layer_bytes: list[int]


def context_info(path: str | os.PathLike) -> ConvertedContextInfo:
    """Read a context without its model, to see what it is and what it holds.

    Raises:
        ValueError: a missing or damaged file, or a file of another kind.
    """
    what = "a context of a converted model"
    metadata, tensors = read_file(path, what=what, file_format=FORMAT, version=VERSION)
    num_tokens = positive_int(path, metadata, "num_tokens")
    check_content(path, metadata, tensors)
    try:
        config = MemoryConfig.from_dict(json.loads(metadata.get("config", "")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the config of a memory, found another ({error})") from error
    layers = [
        {name: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{i}.")}
        for i in range(config.num_layers)
    ]
    # Heads of the same budget share a tensor.
    counts = [
        torch.cat([torch.zeros(0), *(t.flatten() for name, t in layer.items() if name.endswith(".count"))])
        for layer in layers
    ]
    return ConvertedContextInfo(
        num_tokens=num_tokens,
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        dtype=metadata.get("dtype", ""),
        weights=metadata.get("weights", ""),
        config=config,
        counts=[count[count > 0] for count in counts],
        layer_bytes=[sum(tensor.nbytes for tensor in layer.values()) for layer in layers],
    )


def fingerprint(model: Any) -> dict[str, str]:
    """What a memory depends on: its config, the model's dtype, and the SHA-256 of the backbone's weights."""
    return {
        "config": json.dumps(model.memory_config.to_dict(), sort_keys=True),
        "dtype": str(model.dtype),
        "weights": digest(weights_of(model.base_model)),
    }
