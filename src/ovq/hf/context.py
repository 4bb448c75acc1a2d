"""Persistent contexts: read a document once, keep the state of all layers, and answer any number of prompts.

For a model of OVQ and sliding-window layers this takes megabytes, whatever the length of the document: prefix
caching at constant size. On disk a context is one safetensors file, which only the model that read the
document accepts:

    context = build_context(model, document_ids)
    save_context(context, "book.ctx")

    context = load_context("book.ctx", model)
    model.generate(**context.inputs([question_ids, other_question_ids]), max_new_tokens=32)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ovq.hf.cache import CACHE_KEY, OVQCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.hf.modeling_ovq import OVQModel
from ovq.hf.pretrained import OVQPreTrainedModel
from ovq.ops.serialization import positive_int, read_file, upgraded, write_file
from ovq.ops.sums import DTYPES

FORMAT = "ovq-context"
VERSION = "1"

Read = TypeVar("Read")

# All other fields of the config, future ones included, affect what is remembered, and are compared.
_FIELDS_WITHOUT_EFFECT = frozenset(
    {"initializer_range", "tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Context:
    """The memory of a document, from which a model can continue any number of times.

    Made by `build_context` or `load_context`. Using it does not change it: every use gets its own cache.

    Attributes:
        model: the model that read the document.
        num_tokens: tokens of the document.
        fingerprint: the fingerprint of the model as it was then; see the function `fingerprint`.

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

    model: OVQPreTrainedModel
    num_tokens: int
    fingerprint: Mapping[str, str]
    _cache: OVQCache

    def __repr__(self) -> str:
        model = type(self.model).__name__
        return f"Context(num_tokens={self.num_tokens}, {self.nbytes:,} bytes, of {model})"

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return self._cache.nbytes

    def cache(self, num_rows: int = 1) -> OVQCache:
        """A cache of `num_rows` rows that have each read the document; it shares nothing with other caches.

        Pass it to `forward(input_ids, past_key_values=...)`, or to `generate` with an `attention_mask` over
        the tokens of the document and of the prompt; `inputs` makes that mask.
        """
        cache = self._cache.snapshot()
        # Copies, even for one row: two threads must not use caches that share buffers at the same time.
        cache.batch_repeat_interleave(num_rows)
        return cache

    def inputs(self, prompts: Tensor | Sequence[Tensor | Sequence[int]]) -> dict[str, Tensor | OVQCache]:
        """The arguments of `generate` for prompts that follow the document.

        Args:
            prompts: token ids of one or more prompts, of any lengths; a tensor `[B, T]` or a sequence of
                sequences. If lengths differ, all but the last token of each prompt is read here.

        Returns:
            `input_ids` `[B, T]` (shorter prompts padded left), the `attention_mask` over document and
            prompts, and the cache. Use them for one call only: `generate` updates the cache in place.

        Raises:
            ValueError: no prompt, an empty prompt, or token ids that the model does not know.
        """
        rows = [checked_ids(prompt, self.model, what=f"prompt {i}") for i, prompt in enumerate(prompts)]
        if not rows:
            raise ValueError("prompts: expected at least one, found none")
        width = max(map(len, rows))
        pad = self.model.config.pad_token_id or 0
        ids = torch.stack([torch.cat([row.new_full((width - len(row),), pad), row]) for row in rows])
        mask = torch.ones(len(rows), self.num_tokens + width, dtype=torch.int64, device=ids.device)
        for row, tokens in zip(mask, rows, strict=True):
            row[: width - len(tokens)] = 0
        has_one_length = min(map(len, rows)) == width
        cache = self.cache(len(rows)) if has_one_length else self._read(rows)
        return {"input_ids": ids, "attention_mask": mask, CACHE_KEY: cache}

    @torch.no_grad()
    def _read(self, rows: list[Tensor]) -> OVQCache:
        """A cache that has read the document and, in each row, all of a prompt but its last token.

        The tokens of a row must be contiguous, without padding between document and prompt. So prompts of
        equal length are read together, and the rows are joined afterwards, with padding before the document.
        """
        by_length: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(place)
        caches = []
        for length, places in by_length.items():
            caches.append(self.cache(len(places)))
            if length > 1:
                ids = torch.stack([rows[place][:-1] for place in places])
                self.model.base_model(ids, past_key_values=caches[-1])
        joined = OVQCache.concatenate(caches, self.model.config)
        order = torch.tensor([place for places in by_length.values() for place in places])
        joined.batch_select_indices(order.argsort())
        return joined


@torch.no_grad()
def build_context(
    model: OVQPreTrainedModel,
    input_ids: Tensor | Sequence[int],
    *,
    prefill_chunk_size: int = 2048,
    progress: Callable[[int], None] | None = None,
) -> Context:
    """Read a document.

    Args:
        model: an `OVQForCausalLM` or `OVQModel`.
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
    return read_to_the_end(reading, progress)


def read_in_pieces(
    model: OVQPreTrainedModel,
    input_ids: Tensor | Sequence[int],
    *,
    prefill_chunk_size: int = 2048,
    known_fingerprint: Mapping[str, str] | None = None,
) -> Generator[int, None, Context]:
    """What `build_context` does, piece by piece, for a caller that has other things to do in between.

    Gradients are the caller's to switch off.

    Args:
        model: as in `build_context`, like all but the last argument.
        input_ids: likewise.
        prefill_chunk_size: likewise.
        known_fingerprint: the fingerprint of the model if the caller has it, as reading all weights takes
            time.

    Yields:
        The number of tokens read so far, after each piece.

    Returns:
        The context, as the value of the generator.
    """
    if prefill_chunk_size < 1:
        raise ValueError(f"prefill_chunk_size: expected at least 1, found {prefill_chunk_size}")
    ids = checked_ids(input_ids, model, what="input_ids")
    cache = OVQCache(model.config)
    num_read = 0
    for piece in ids.split(prefill_chunk_size):
        model.base_model(piece[None], past_key_values=cache)
        num_read += len(piece)
        yield num_read
    own = fingerprint(model) if known_fingerprint is None else known_fingerprint
    return Context(model=model, num_tokens=num_read, fingerprint=own, _cache=cache)


def read_to_the_end(reading: Generator[int, None, Read], progress: Callable[[int], None] | None) -> Read:
    """What a generator of `read_in_pieces` returns; `progress` is called with all that it yields."""
    while True:
        try:
            num_read = next(reading)
        except StopIteration as end:
            return end.value
        if progress is not None:
            progress(num_read)


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
        f"layers.{i}.{name}": tensor
        for i, layer in enumerate(context._cache.layers)
        for name, tensor in layer.tensors().items()
    }
    _check_layers("context", tensors, context.model, context.num_tokens)
    metadata = {"format": FORMAT, "version": VERSION, "num_tokens": str(context.num_tokens)}
    metadata |= {**context.fingerprint, "content": digest(tensors)}
    write_file(path, tensors, metadata=metadata)


def load_context(path: str | os.PathLike, model: OVQPreTrainedModel) -> Context:
    """Read a context for the model that made it, onto the model's device.

    Raises:
        ValueError: a missing or damaged file, a file of another kind, or a context of another model or
            config.
    """
    metadata, tensors = read_file(path, what="a saved context", file_format=FORMAT, version=VERSION)
    num_tokens = positive_int(path, metadata, "num_tokens")
    own = fingerprint(model)
    _check_fingerprint(str(path), metadata, own)
    check_content(path, metadata, tensors)
    _check_layers(str(path), tensors, model, num_tokens)
    cache = OVQCache(model.config)
    for i, layer in enumerate(cache.layers):
        layer.restore(of_layer(tensors, i), num_tokens, model.device)
    return Context(model=model, num_tokens=num_tokens, fingerprint=own, _cache=cache)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ContextInfo:
    """What a context file says of itself, without the model.

    Attributes:
        num_tokens: tokens of the document.
        nbytes: bytes of the memory.
        dtype: that of the model.
        weights: SHA-256 of the model's weights.
        config: the config of the model, as far as the memory depends on it.
        cache: the memory, by layer.
    """

    num_tokens: int
    nbytes: int
    dtype: str
    weights: str
    config: OVQConfig
    cache: OVQCache


def context_info(path: str | os.PathLike) -> ContextInfo:
    """Read a context without its model, to see what it is and what it holds.

    Raises:
        ValueError: a missing or damaged file, or a file of another kind.

    Example:
        >>> import tempfile
        >>> from ovq.hf import OVQModel
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> path = os.path.join(tempfile.mkdtemp(), "book.ctx")
        >>> save_context(build_context(OVQModel(config), torch.arange(300) % 8), path)
        >>> info = context_info(path)
        >>> info.num_tokens, info.config.mixer_types
        (300, ['sliding_attention', 'ovq'])
        >>> info.cache.layers[1].state.summary().num_open
        (204,)
    """
    metadata, tensors = read_file(path, what="a saved context", file_format=FORMAT, version=VERSION)
    num_tokens = positive_int(path, metadata, "num_tokens")
    check_content(path, metadata, tensors)
    config = _config_of(path, metadata)
    dtypes = {str(dtype): dtype for dtype in DTYPES}
    if (dtype := metadata.get("dtype", "")) not in dtypes:
        raise ValueError(f"{path}: expected a model in one of {', '.join(dtypes)}, found {dtype!r}")
    # Every layer has a tensor at least; a file may claim any number of layers.
    if config.num_hidden_layers > len(tensors):
        raise ValueError(
            f"{path}: expected tensors of {config.num_hidden_layers} layers, found {len(tensors)} tensors"
        )
    # Only shapes matter, so no weights are allocated.
    with torch.device("meta"):
        # transformers wraps `to` in a way that leaves mypy without its `self`.
        model = OVQModel(config).to(dtypes[dtype])  # type: ignore[arg-type]
    _check_layers(str(path), tensors, model, num_tokens)
    cache = OVQCache(config)
    for i, layer in enumerate(cache.layers):
        layer.restore(of_layer(tensors, i), num_tokens)
    return ContextInfo(
        num_tokens=num_tokens,
        nbytes=cache.nbytes,
        dtype=dtype,
        weights=metadata.get("weights", ""),
        config=config,
        cache=cache,
    )


def fingerprint(model: OVQPreTrainedModel) -> dict[str, str]:
    """Everything that a memory depends on: config fields, dtype, and the SHA-256 of the backbone's weights.

    The output layer is left out, because it does not affect the memory.

    Example:
        >>> from ovq.hf import OVQConfig, OVQModel
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model, other = OVQModel(config), OVQModel(config)
        >>> one, two = fingerprint(model), fingerprint(other)
        >>> one["config"] == two["config"], one["weights"] == two["weights"]
        (True, False)
    """
    names = sorted(set(OVQConfig.__annotations__) & {field.name for field in dataclasses.fields(OVQConfig)})
    fields = {name: getattr(model.config, name) for name in names if name not in _FIELDS_WITHOUT_EFFECT}
    return {
        "config": json.dumps(fields, sort_keys=True),
        "dtype": str(model.dtype),
        "weights": digest(weights_of(model.base_model)),
    }


def weights_of(model: nn.Module) -> Mapping[str, Tensor]:
    """All weights by name, including those that accelerate has offloaded."""
    found = model.state_dict()
    if any(tensor.is_meta for tensor in found.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        return get_state_dict_offloaded_model(model)
    return found


def _check_fingerprint(where: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise ValueError, naming the first difference, unless the two fingerprints are equal."""
    own = json.loads(expected["config"])
    # A file that is older than a field was made with what is now the field's default.
    defaults = {field.name: field.default for field in dataclasses.fields(OVQConfig) if field.name in own}
    other = defaults | _config_fields(where, found)
    # What differs because `merge` does would puzzle a user who set that alone.
    for name in sorted(own.keys() | other.keys(), key=lambda name: (name == "growth", name)):
        if own.get(name) != other.get(name):
            raise ValueError(
                f"{where}: expected a context made with {name}={own.get(name)!r}, as the model has, "
                f"found {name}={other.get(name)!r}"
            )
    if found.get("dtype") != expected["dtype"]:
        raise ValueError(
            f"{where}: expected a context of a model in {expected['dtype']}, found {found.get('dtype')}"
        )
    if found.get("weights") != expected["weights"]:
        raise ValueError(
            f"{where}: expected a context of this very model (SHA-256 of its weights {expected['weights']}), "
            f"found one of other weights ({found.get('weights')})"
        )


def _config_fields(where: str | os.PathLike, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of the config in a file, with the names that they have now."""
    try:
        return OVQConfig.upgraded(json.loads(metadata.get("config", "")))
    except (AttributeError, StrictDataclassError, TypeError, ValueError) as error:
        found = metadata.get("config")
        raise ValueError(f"{where}: expected the config of a model, found {found!r} ({error})") from None


def _config_of(path: str | os.PathLike, metadata: Mapping[str, str]) -> OVQConfig:
    """The config in a file."""
    fields = _config_fields(path, metadata)
    try:
        return OVQConfig(**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected the config of a model, found {fields} ({error})") from error


def check_content(
    path: str | os.PathLike, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless the tensors are those that were written."""
    if (found := digest(tensors)) != metadata.get("content"):
        raise ValueError(
            f"{path}: expected tensors of SHA-256 {metadata.get('content')}, found {found}: it is damaged"
        )


def of_layer(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The tensors of one layer, by their names in it."""
    prefix = f"layers.{index}."
    return upgraded({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})


def _check_layers(
    where: str, tensors: Mapping[str, Tensor], model: OVQPreTrainedModel, num_tokens: int
) -> None:
    """Raise ValueError unless the tensors can be this model's memory of `num_tokens` tokens."""
    mixers = model.mixers()
    expected = {
        f"layers.{i}.{name}"
        for i, mixer in enumerate(mixers)
        for name in mixer.state_spec(num_tokens, model.dtype)
    }
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise ValueError(
            f"{where}: expected the {len(expected)} tensors of a cache, found others; they differ in {odd}"
        )
    for i, mixer in enumerate(mixers):
        own = of_layer(tensors, i)
        mixer.check_state(f"{where}: layer {i}", own, num_tokens=num_tokens, dtype=model.dtype)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def checked_ids(ids: Tensor | Sequence[int], model: OVQPreTrainedModel, *, what: str) -> Tensor:
    """Token ids as a tensor `[T]` on the model's device; ValueError unless the model knows them."""
    tensor = torch.as_tensor(ids)
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
