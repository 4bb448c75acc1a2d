"""Persistent contexts: read a document once, keep the state of all layers, and answer any number of prompts.

For a model of OVQ and sliding-window layers, or a converted one (`ovq.convert`), this takes megabytes,
whatever the length of the document: prefix caching at constant size. On disk a context is one safetensors
file, which only the model that read the document accepts:

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
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ovq.hf.cache import CACHE_KEY, OVQCache, StateCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.hf.modeling_ovq import OVQModel
from ovq.hf.pretrained import WITHOUT_EFFECT
from ovq.ops.serialization import format_of, positive_int, read_file, upgraded, write_file
from ovq.ops.sums import DTYPES

FORMAT = "ovq-context"
VERSION = "1"

Tensors = Mapping[str, Tensor]


class ContextModel(Protocol):
    """What contexts need of a model: an `OVQModel` or `OVQForCausalLM`, or a converted model."""

    config: Any
    context_kind: str

    @property
    def base_model(self) -> Any:
        """The model without its output layer."""

    @property
    def device(self) -> torch.device:
        """Where inputs go."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    def make_cache(self) -> Any:
        """An empty cache of the model."""

    def memory_fields(self) -> dict[str, Any]:
        """What a memory depends on beside weights and dtype, as in JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """Contexts of one kind of models: how their files are read without the model.

    Attributes:
        upgraded: the `memory_fields` that a file has, with the names and defaults of today.
        config: the config that has these fields.
        cache: an empty cache of a model of this config.
        check: raises ValueError, naming the file, unless the tensors of each layer can be the memory that a
            model of this config and dtype has of so many tokens.
    """

    upgraded: Callable[[dict[str, Any]], dict[str, Any]]
    config: Callable[[dict[str, Any]], Any]
    cache: Callable[[Any], StateCache]
    check: Callable[[str, Sequence[Tensors], Any, torch.dtype, int], None]


#: By the name that `context_kind` gives them; `ovq.convert` adds its own.
KINDS: dict[str, Kind] = {}

# Formats of earlier versions, each with its version and the kind of its contexts.
_EARLIER_FORMATS = {"ovq-converted-context": ("2", "converted")}


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

    model: ContextModel
    num_tokens: int
    fingerprint: Mapping[str, str]
    _cache: StateCache

    def __repr__(self) -> str:
        model = type(self.model).__name__
        return f"Context(num_tokens={self.num_tokens}, {self.nbytes:,} bytes, of {model})"

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return self._cache.nbytes

    def cache(self, num_rows: int = 1) -> StateCache:
        """A cache of `num_rows` rows that have each read the document; it shares nothing with other caches.

        Pass it to `forward(input_ids, past_key_values=...)`, or to `generate` with an `attention_mask` over
        the tokens of the document and of the prompt; `inputs` makes that mask.
        """
        # Copies, even for one row: two threads must not use caches that share buffers at the same time.
        return self._cache.selected([0] * num_rows)

    def inputs(self, prompts: Tensor | Sequence[Tensor | Sequence[int]]) -> dict[str, Any]:
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
        pad = getattr(self.model.config, "pad_token_id", None) or 0
        ids = torch.stack([torch.cat([row.new_full((width - len(row),), pad), row]) for row in rows])
        mask = torch.ones(len(rows), self.num_tokens + width, dtype=torch.int64, device=ids.device)
        for row, tokens in zip(mask, rows, strict=True):
            row[: width - len(tokens)] = 0
        has_one_length = min(map(len, rows)) == width
        cache = self.cache(len(rows)) if has_one_length else self._read(rows)
        return {"input_ids": ids, "attention_mask": mask, CACHE_KEY: cache}

    @torch.no_grad()
    def _read(self, rows: list[Tensor]) -> StateCache:
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
                self.model.base_model(ids, **{CACHE_KEY: caches[-1]})
        joined = type(caches[0]).concatenate(caches)
        order = torch.tensor([place for places in by_length.values() for place in places])
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
    """Read a document.

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
    cache = model.make_cache()
    num_read = 0
    for piece in ids.split(prefill_chunk_size):
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
        f"layers.{i}.{name}": tensor
        for i, layer in enumerate(context._cache.layers)
        for name, tensor in layer.tensors().items()
    }
    model, kind = context.model, KINDS[context.model.context_kind]
    config = kind.config(json.loads(context.fingerprint["config"]))
    _check_layers("context", tensors, kind, config, model.dtype, context.num_tokens)
    metadata = {"format": FORMAT, "version": VERSION, "num_tokens": str(context.num_tokens)}
    metadata["kind"] = model.context_kind
    metadata |= {**context.fingerprint, "content": digest(tensors)}
    write_file(path, tensors, metadata=metadata)


def load_context(path: str | os.PathLike, model: ContextModel) -> Context:
    """Read a context for the model that made it, onto the model's device.

    Raises:
        ValueError: a missing or damaged file, a file of another kind, or a context of another model or
            config.
    """
    metadata, tensors = _read(path)
    num_tokens = positive_int(path, metadata, "num_tokens")
    if (found := metadata["kind"]) != model.context_kind:
        raise ValueError(
            f"{path}: expected a context of a model of kind {model.context_kind!r}, found one of {found!r}"
        )
    own, kind = fingerprint(model), KINDS[model.context_kind]
    _check_fingerprint(str(path), metadata, own, kind)
    check_content(path, metadata, tensors)
    config = kind.config(json.loads(own["config"]))
    layers = _check_layers(str(path), tensors, kind, config, model.dtype, num_tokens)
    cache = model.make_cache()
    for layer, own_tensors in zip(cache.layers, layers, strict=True):
        layer.restore(own_tensors, num_tokens, model.device)
    return Context(model=model, num_tokens=num_tokens, fingerprint=own, _cache=cache)


def _read(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a context, those of earlier formats with a kind."""
    what = "a saved context"
    if (found := format_of(path)) in _EARLIER_FORMATS:
        version, kind = _EARLIER_FORMATS[found]
        metadata, tensors = read_file(path, what=what, file_format=found, version=version)
        return {**metadata, "kind": kind}, tensors
    metadata, tensors = read_file(path, what=what, file_format=FORMAT, version=VERSION)
    return {"kind": "ovq", **metadata}, tensors


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ContextInfo:
    """What a context file says of itself, without the model.

    Attributes:
        num_tokens: tokens of the document.
        nbytes: bytes of the memory.
        dtype: that of the model.
        weights: SHA-256 of the model's weights.
        config: the config of the model, as far as the memory depends on it: an `OVQConfig`, or the
            `MemoryConfig` of a converted model.
        cache: the memory, by layer.
    """

    num_tokens: int
    nbytes: int
    dtype: str
    weights: str
    config: Any
    cache: StateCache


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
    metadata, tensors = _read(path)
    num_tokens = positive_int(path, metadata, "num_tokens")
    check_content(path, metadata, tensors)
    if (name := metadata["kind"]) not in KINDS:
        raise ValueError(f"{path}: expected a context of kind {', '.join(KINDS)}, found {name!r}")
    kind = KINDS[name]
    config = _config_of(path, metadata, kind)
    dtypes = {str(dtype): dtype for dtype in DTYPES}
    if (dtype := metadata.get("dtype", "")) not in dtypes:
        raise ValueError(f"{path}: expected a model in one of {', '.join(dtypes)}, found {dtype!r}")
    layers = _check_layers(str(path), tensors, kind, config, dtypes[dtype], num_tokens)
    cache = kind.cache(config)
    for layer, own in zip(cache.layers, layers, strict=True):
        layer.restore(own, num_tokens)
    return ContextInfo(
        num_tokens=num_tokens,
        nbytes=cache.nbytes,
        dtype=dtype,
        weights=metadata.get("weights", ""),
        config=config,
        cache=cache,
    )


def fingerprint(model: ContextModel) -> dict[str, str]:
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
    return {
        "config": json.dumps(model.memory_fields(), sort_keys=True),
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


def _check_fingerprint(where: str, found: Mapping[str, str], expected: Mapping[str, str], kind: Kind) -> None:
    """Raise ValueError, naming the first difference, unless the two fingerprints are equal."""
    own = json.loads(expected["config"])
    other = _config_fields(where, found, kind)
    # What differs because `merge` does would puzzle a user who set that alone.
    for name in sorted(own.keys() | other.keys(), key=lambda name: (name == "growth", name)):
        if own.get(name) != other.get(name):
            raise ValueError(
                f"{where}: expected a context made with {name}={own.get(name)!r:.100}, as the model has, "
                f"found {name}={other.get(name)!r:.100}"
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


def _config_fields(where: str | os.PathLike, metadata: Mapping[str, str], kind: Kind) -> dict[str, Any]:
    """The fields of the config in a file, with the names that they have now."""
    try:
        return kind.upgraded(json.loads(metadata.get("config", "")))
    except (AttributeError, StrictDataclassError, TypeError, ValueError) as error:
        found = metadata.get("config")
        raise ValueError(f"{where}: expected the config of a model, found {found!r:.500} ({error})") from None


def _config_of(path: str | os.PathLike, metadata: Mapping[str, str], kind: Kind) -> Any:
    """The config in a file."""
    fields = _config_fields(path, metadata, kind)
    try:
        return kind.config(fields)
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


def _check_layers(
    where: str, tensors: Tensors, kind: Kind, config: Any, dtype: torch.dtype, num_tokens: int
) -> list[dict[str, Tensor]]:
    """The tensors of each layer; ValueError unless they can be a model's memory of `num_tokens` tokens."""
    num_layers = len(kind.cache(config).layers)
    # Every layer has a tensor at least; a file may claim any number of layers.
    if num_layers > len(tensors):
        raise ValueError(f"{where}: expected tensors of {num_layers} layers, found {len(tensors)} tensors")
    layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
    for name, tensor in tensors.items():
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if found is None or int(found[1]) >= num_layers:
            raise ValueError(f"{where}: expected tensors of {num_layers} layers, found {name!r}")
        layers[int(found[1])][found[2]] = tensor
    layers = [upgraded(own) for own in layers]
    kind.check(where, layers, config, dtype, num_tokens)
    return layers


def _upgraded_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of an `OVQConfig` in a file; one that is older than a field was made with its default of now."""
    own = set(OVQConfig.__annotations__) - WITHOUT_EFFECT
    defaults = {field.name: field.default for field in dataclasses.fields(OVQConfig) if field.name in own}
    return defaults | OVQConfig.upgraded(fields)


def _check_states(
    where: str, layers: Sequence[Tensors], config: OVQConfig, dtype: torch.dtype, num_tokens: int
) -> None:
    """`Kind.check` of OVQ models."""
    # Only shapes matter, so no weights are allocated.
    with torch.device("meta"):
        # transformers wraps `to` in a way that leaves mypy without its `self`.
        model = OVQModel(config).to(dtype)  # type: ignore[arg-type]
    for i, (mixer, own) in enumerate(zip(model.mixers(), layers, strict=True)):
        expected = set(mixer.state_spec(num_tokens, dtype))
        if set(own) != expected:
            odd = sorted(set(own) ^ expected)
            raise ValueError(
                f"{where}: layer {i}: expected {len(expected)} tensors, found others; they differ in {odd}"
            )
        mixer.check_state(f"{where}: layer {i}", own, num_tokens=num_tokens, dtype=dtype)


KINDS["ovq"] = Kind(
    upgraded=_upgraded_fields,
    config=lambda fields: OVQConfig(**fields),
    cache=OVQCache,
    check=_check_states,
)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def checked_ids(ids: Tensor | Sequence[int], model: ContextModel, *, what: str) -> Tensor:
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
