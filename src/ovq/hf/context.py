"""Persistent contexts: read a document once, keep the state of all layers, and answer any number of prompts.

This is prefix caching at constant size: for a model of OVQ and sliding-window layers, or a converted one
(`ovq.convert`), a context takes megabytes, whatever the length of the document. On disk it is one safetensors
file, which can only be loaded for the model that read the document:

    context = build_context(model, document_ids)
    save_context(context, "book.ctx")

    context = load_context("book.ctx", model)
    model.generate(**context.inputs([question_ids, other_question_ids]), max_new_tokens=32)
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ovq.hf.cache import CACHE_KEY, StateCache
from ovq.hf.context_file import (
    FORMAT,
    KINDS,
    VERSION,
    ContextModel,
    check_fingerprint,
    checked_layers,
    digest,
    fingerprint,
    read_context,
)
from ovq.ops.serialization import write_file


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Context:
    """The memory of a document, from which a model can continue any number of times.

    Made by `build_context`, `load_context` or, from a cache, `Context.of`. It is never changed: every use
    gets its own cache.

    Attributes:
        model: the model that read the document.
        num_tokens: number of tokens of the document.
        fingerprint: fingerprint of the model when it read the document; see the function `fingerprint`.
        note: free text that is saved with the context, such as the messages of a chat.

    Example:
        >>> from ovq.hf import OVQConfig, OVQForCausalLM
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = OVQForCausalLM(config).eval()
        >>> context = build_context(model, torch.arange(300) % 8)
        >>> context
        Context(num_tokens=300, 63,176 bytes, of OVQForCausalLM)
        >>> prompts = [[1, 2, 3], [4]]
        >>> model.generate(**context.inputs(prompts), max_new_tokens=5, do_sample=False).shape
        torch.Size([2, 8])
    """

    model: ContextModel
    num_tokens: int
    fingerprint: Mapping[str, str]
    note: str = ""
    _cache: StateCache

    @classmethod
    def of(cls, model: ContextModel, cache: StateCache, *, note: str = "") -> Context:
        """The context of the tokens in `cache`: one row, without padding. Do not use the cache afterwards.

        Raises:
            ValueError: a cache of another number of rows, with padding, or without tokens.

        Example:
            >>> from ovq.hf import OVQConfig, OVQModel
            >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
            >>> model = OVQModel(config).eval()
            >>> cache = model.make_cache()
            >>> _ = model(torch.tensor([[1, 2, 3]]), past_key_values=cache)
            >>> Context.of(model, cache.snapshot()).num_tokens
            3
        """
        if cache.num_rows != 1 or any(layer.has_padding for layer in cache.layers):
            raise ValueError(
                "expected a cache of one row that has read at least one token, and no padding, "
                f"found {cache!r}"
            )
        num_tokens, own = cache.num_columns, fingerprint(model)
        return cls(model=model, num_tokens=num_tokens, fingerprint=own, note=note, _cache=cache)

    def __repr__(self) -> str:
        model = type(self.model).__name__
        return f"Context(num_tokens={self.num_tokens}, {self.nbytes:,} bytes, of {model})"

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return self._cache.nbytes

    def cache(self, num_rows: int = 1) -> StateCache:
        """A new cache of `num_rows` rows that have each read the document.

        Pass it to `forward(input_ids, past_key_values=...)`, or to `generate` with an `attention_mask` over
        the tokens of the document and of the prompt; `inputs` makes that mask.
        """
        # A copy even for one row: two threads must not use caches that share buffers at the same time.
        return self._cache.selected([0] * num_rows)

    def inputs(self, prompts: Tensor | Sequence[Tensor | Sequence[int]]) -> dict[str, Any]:
        """Arguments of `generate` for prompts that follow the document.

        Args:
            prompts: token ids of one or more prompts, of any lengths; a tensor `[B, T]` or a sequence of
                sequences. If lengths differ, all tokens of each prompt but the last are read here.

        Returns:
            `input_ids` `[B, T]` (shorter prompts padded left), the `attention_mask` over document and
            prompts, and the cache. Use them for one call only: `generate` updates the cache in place.

        Raises:
            ValueError: no prompt, an empty prompt, or token ids that the model does not know.
        """
        rows = [checked_ids(prompt, self.model, what=f"prompt {i}") for i, prompt in enumerate(prompts)]
        if not rows:
            raise ValueError("prompts: expected at least one, found none")
        padded = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        ids = padded(rows, padding_value=getattr(self.model.config, "pad_token_id", None) or 0)
        mask = padded([row.new_ones(self.num_tokens + len(row)) for row in rows])
        cache = self.cache(len(rows)) if len({*map(len, rows)}) == 1 else self._read(rows)
        return {"input_ids": ids, "attention_mask": mask, CACHE_KEY: cache}

    @torch.no_grad()
    def _read(self, rows: list[Tensor]) -> StateCache:
        """A cache that has read the document and, in each row, all tokens of a prompt but the last.

        There must be no padding between document and prompt. So prompts of equal length are read together,
        and the rows are joined afterwards, with padding before the document.
        """
        by_length: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(place)
        caches = []
        for length, places in by_length.items():
            caches.append(self.cache(len(places)))
            if length > 1:
                ids = torch.stack([rows[place][:-1] for place in places])
                self.model.base_model(ids, **{CACHE_KEY: caches[-1]})
        joined = type(caches[0]).concatenate(caches)
        order = torch.tensor([place for places in by_length.values() for place in places], device="cpu")
        joined.batch_select_indices(order.argsort())
        return joined


@torch.no_grad()
def build_context(
    model: ContextModel,
    input_ids: Tensor | Sequence[int],
    *,
    prefill_chunk_size: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Context:
    """Read a document and return its context.

    Args:
        model: an `OVQForCausalLM`, an `OVQModel` or a converted model.
        input_ids: `[T]` or `[1, T]` token ids of the document.
        prefill_chunk_size: tokens per forward pass, which bounds the memory needed; it changes the result
            only by rounding.
        progress: called with the number of tokens read so far, after each piece.

    Raises:
        ValueError: an empty document, ids that the model does not know, or `prefill_chunk_size` below 1.

    Example:
        >>> from ovq.hf import OVQConfig, OVQModel
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> build_context(OVQModel(config), [1, 2, 3], prefill_chunk_size=2, progress=print).num_tokens
        2
        3
        3
    """
    reading = read_in_pieces(model, input_ids, prefill_chunk_size=prefill_chunk_size)
    while True:
        try:
            num_read = next(reading)
        except StopIteration as end:
            return end.value
        if progress is not None:
            progress(num_read)


def read_in_pieces(
    model: ContextModel,
    input_ids: Tensor | Sequence[int],
    *,
    prefill_chunk_size: int = 2048,
    known_fingerprint: Mapping[str, str] | None = None,
) -> Generator[int, None, Context]:
    """Generator version of `build_context`, for a caller that does other work between the pieces.

    The caller must disable gradients.

    Args:
        model, input_ids, prefill_chunk_size: as in `build_context`.
        known_fingerprint: fingerprint of the model, if known; computing it reads all weights.

    Yields:
        The number of tokens read so far, after each piece; the generator returns the context.
    """
    if prefill_chunk_size < 1:
        raise ValueError(f"prefill_chunk_size: expected at least 1, found {prefill_chunk_size}")
    ids = checked_ids(input_ids, model, what="input_ids")
    cache = model.make_cache()
    num_read = 0
    for piece in ids.split(min(prefill_chunk_size, len(ids))):
        model.base_model(piece[None], **{CACHE_KEY: cache})
        num_read += len(piece)
        yield num_read
    own = fingerprint(model) if known_fingerprint is None else known_fingerprint
    return Context(model=model, num_tokens=num_read, fingerprint=own, _cache=cache)


def save_context(context: Context, path: str | os.PathLike) -> None:
    """Write a context to one safetensors file, atomically: if writing fails, an old file stays as it was.

    Raises:
        OSError: the file cannot be written.
        ValueError: a context that `load_context` would refuse, such as one that holds NaN.

    Example:
        >>> import tempfile
        >>> from ovq.hf import OVQConfig, OVQModel
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = OVQModel(config)
        >>> path = os.path.join(tempfile.mkdtemp(), "book.ctx")
        >>> save_context(build_context(model, [1, 2, 3]), path)
        >>> load_context(path, model).num_tokens
        3
    """
    tensors = {
        # Where layers have counted tokens together, they share the number, which safetensors refuses.
        f"layers.{i}.{name}": tensor.clone() if name.endswith("num_seen") else tensor
        for i, layer in enumerate(context._cache.layers)
        for name, tensor in layer.tensors().items()
    }
    model, kind = context.model, KINDS[context.model.context_kind]
    config = kind.config(json.loads(context.fingerprint["config"]))
    checked_layers("context", tensors, kind, config, model.dtype, context.num_tokens)
    metadata = {"format": FORMAT, "version": VERSION, "num_tokens": str(context.num_tokens)}
    metadata["kind"] = model.context_kind
    metadata |= {**context.fingerprint, "content": digest(tensors), "note": context.note}
    write_file(path, tensors, metadata=metadata)


def load_context(
    path: str | os.PathLike, model: ContextModel, *, known_fingerprint: Mapping[str, str] | None = None
) -> Context:
    """Load a context for the model that made it, onto the model's device.

    Args:
        path: a file of `save_context`.
        model: the model that read the document.
        known_fingerprint: as in `read_in_pieces`.

    Raises:
        ValueError: a missing or damaged file, a file of another kind, or a context of another model or
            config.
    """
    metadata, tensors, num_tokens = read_context(path)
    if (found := metadata["kind"]) != model.context_kind:
        raise ValueError(
            f"{path}: expected a context of a model of kind {model.context_kind!r}, found one of {found!r}"
        )
    own = fingerprint(model) if known_fingerprint is None else known_fingerprint
    kind = KINDS[model.context_kind]
    check_fingerprint(str(path), metadata, own, kind)
    config = kind.config(json.loads(own["config"]))
    layers = checked_layers(str(path), tensors, kind, config, model.dtype, num_tokens)
    cache = model.make_cache()
    for layer, own_tensors in zip(cache.layers, layers, strict=True):
        layer.restore(own_tensors, num_tokens, model.device)
    note = metadata.get("note", "")
    return Context(model=model, num_tokens=num_tokens, fingerprint=own, note=note, _cache=cache)


def checked_ids(ids: Tensor | Sequence[int], model: ContextModel, *, what: str) -> Tensor:
    """Token ids as a tensor `[T]` on the model's device; ValueError for ids outside the vocabulary."""
    tensor = ids if isinstance(ids, Tensor) else torch.tensor(ids, device="cpu")
    if tensor.dim() == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 1 or len(tensor) == 0:
        raise ValueError(f"{what}: expected one row of at least 1 token, found shape {list(tensor.shape)}")
    lowest, highest = int(tensor.min()), int(tensor.max())
    if tensor.is_floating_point() or lowest < 0 or highest >= model.config.vocab_size:
        raise ValueError(
            f"{what}: expected integer token ids in 0..{model.config.vocab_size - 1}, "
            f"found {tensor.dtype} in {lowest}..{highest}"
        )
    return tensor.to(model.device, torch.int64)
