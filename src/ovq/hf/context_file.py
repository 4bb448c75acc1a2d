"""Files of contexts: kinds of models, fingerprints, and the checks of loaded tensors.

OVQ models are one kind of models; `ovq.convert` adds another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from ovq.hf.cache import OVQCache, StateCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.hf.modeling_ovq import OVQModel
from ovq.hf.pretrained import WITHOUT_EFFECT
from ovq.ops.serialization import format_of, read_file, upgraded, whole_number
from ovq.ops.sums import DTYPES

FORMAT = "ovq-context"
VERSION = "1"

# Formats, also of earlier versions: their version, and the kind of contexts where a file does not say it.
_FORMATS = {FORMAT: (VERSION, "ovq"), "ovq-converted-context": ("2", "converted")}

Tensors = Mapping[str, Tensor]


class ContextModel(Protocol):
    """What contexts and streams need from an `OVQModel`, an `OVQForCausalLM` or a converted model."""

    config: Any
    context_kind: str

    def __call__(self, input_ids: Tensor, /, **kwargs: Any) -> Any:
        """Hidden states, or logits."""

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""

    @property
    def base_model(self) -> Any:
        """The model without its output layer."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""

    def make_cache(self) -> Any:
        """An empty cache of the model."""

    def memory_fields(self) -> dict[str, Any]:
        """All settings, besides weights and dtype, that a memory depends on, as JSON types."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """How to read the context files of one kind of models without the model.

    Attributes:
        upgraded: returns the `memory_fields` in a file with current names and defaults.
        tensors: returns the tensors of a layer in a file with current names and dtypes.
        config: makes the config from these fields.
        cache: makes an empty cache from the config.
        size: says how large a memory with this config is, for users who have not chosen what its fields
            list; empty if they have.
        check: raises ValueError, naming the file, unless the tensors of each layer can be the memory of a
            model with this config and dtype after this many tokens.
    """

    upgraded: Callable[[dict[str, Any]], dict[str, Any]]
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    config: Callable[[dict[str, Any]], Any]
    cache: Callable[[Any], StateCache]
    check: Callable[[str, Sequence[Tensors], Any, torch.dtype, int], None]
    size: Callable[[Any], str] = lambda config: ""


#: Kinds by the value of `context_kind`; `ovq.convert` adds its own.
KINDS: dict[str, Kind] = {}


def _upgraded_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Current `OVQConfig` fields from those in a file; fields newer than the file get their defaults."""
    fields = OVQConfig.upgraded(fields)
    defaults = OVQConfig.field_defaults(fields.get("mixer_types"))
    return {name: value for name, value in defaults.items() if name not in WITHOUT_EFFECT} | fields


def check_names(where: str, tensors: Tensors, names: Iterable[str]) -> None:
    """Raise ValueError, naming `where`, unless the tensors have these names."""
    if odd := sorted(set(tensors) ^ set(names)):
        raise ValueError(f"{where}: expected {len(set(names))} tensors, found others; they differ in {odd}")


def _check_states(
    where: str, layers: Sequence[Tensors], config: OVQConfig, dtype: torch.dtype, num_tokens: int
) -> None:
    """`Kind.check` of OVQ models."""
    # Only shapes matter, so no weights are allocated.
    with torch.device("meta"):
        # transformers wraps `to` in a way that leaves mypy without its `self`.
        model = OVQModel(config).to(dtype)  # type: ignore[arg-type]
    for i, (mixer, own) in enumerate(zip(model.mixers(), layers, strict=True)):
        check_names(f"{where}: layer {i}", own, mixer.state_spec(num_tokens, dtype))
        mixer.check_state(f"{where}: layer {i}", own, num_tokens=num_tokens, dtype=dtype)


KINDS["ovq"] = Kind(
    upgraded=_upgraded_fields,
    tensors=upgraded,
    config=lambda fields: OVQConfig(**fields),
    cache=OVQCache,
    check=_check_states,
)


def fingerprint(model: ContextModel) -> dict[str, str]:
    """Everything that a memory depends on: config fields, dtype, and the SHA-256 of the backbone's weights.

    The output layer does not affect the memory and is left out.
    """
    return {
        "config": json.dumps(model.memory_fields(), sort_keys=True),
        "dtype": str(model.dtype),
        "weights": getattr(model, "weights_digest", None) or digest(weights_of(model.base_model)),
    }


def weights_of(model: nn.Module) -> Mapping[str, Tensor]:
    """All weights by name, including those that accelerate has offloaded."""
    found = model.state_dict()
    if any(tensor.is_meta for tensor in found.values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        return get_state_dict_offloaded_model(model)
    return found


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of tensors."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_context(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor], int]:
    """Metadata (with `kind`), tensors and the number of tokens of a context file that is not damaged."""
    found = format_of(path)
    file_format = found if found in _FORMATS else FORMAT
    version, kind = _FORMATS[file_format]
    metadata, tensors = read_file(path, what="a saved context", file_format=file_format, version=[version])
    num_tokens = whole_number(path, metadata, "num_tokens")
    if (content := digest(tensors)) != metadata.get("content"):
        raise ValueError(
            f"{path}: expected tensors of SHA-256 {metadata.get('content')}, found {content}: it is damaged"
        )
    return {**metadata, "kind": metadata.get("kind") or kind}, tensors, num_tokens


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ContextInfo:
    """Content of a context file, without the model.

    Attributes:
        num_tokens: number of tokens of the document.
        nbytes: bytes of the memory.
        dtype: dtype of the model.
        weights: SHA-256 of the model's weights.
        config: the fields of the model's config that the memory depends on: an `OVQConfig`, or the
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
    """Read a context file without its model, to inspect it.

    Raises:
        ValueError: a missing or damaged file, or a file of another kind.

    Example:
        >>> import tempfile
        >>> from ovq.hf import OVQConfig, OVQModel, build_context, save_context
        >>> config = OVQConfig(vocab_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> path = os.path.join(tempfile.mkdtemp(), "book.ctx")
        >>> save_context(build_context(OVQModel(config), torch.arange(300) % 8), path)
        >>> info = context_info(path)
        >>> info.num_tokens, info.config.mixer_types
        (300, ['sliding_attention', 'ovq'])
        >>> info.cache.layers[1].state.summary().num_open
        (204,)
    """
    metadata, tensors, num_tokens = read_context(path)
    if (name := metadata["kind"]) not in KINDS:
        raise ValueError(f"{path}: expected a context of kind {', '.join(KINDS)}, found {name!r}")
    kind = KINDS[name]
    config = _config_of(path, metadata, kind, kind.config)
    dtypes = {str(dtype): dtype for dtype in DTYPES}
    if (dtype := metadata.get("dtype", "")) not in dtypes:
        raise ValueError(f"{path}: expected a model in one of {', '.join(dtypes)}, found {dtype!r}")
    layers = checked_layers(str(path), tensors, kind, config, dtypes[dtype], num_tokens)
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


def check_fingerprint(where: str, found: Mapping[str, str], expected: Mapping[str, str], kind: Kind) -> None:
    """Raise ValueError, naming the first difference, unless the two fingerprints are equal."""
    own = json.loads(expected["config"])
    other = _config_of(where, found, kind, dict)
    # `growth` last: it may differ only because `merge` does, and a user who set `merge` would be puzzled.
    for name in sorted(own.keys() | other.keys(), key=lambda name: (name == "growth", name)):
        ours, theirs = own.get(name), other.get(name)
        if ours != theirs:
            sizes = [kind.size(_config_of(where, x, kind, kind.config)) for x in (expected, found)]
            if sizes[0] and (isinstance(ours, list) or isinstance(theirs, list)):
                raise ValueError(
                    f"{where}: expected a context of this conversion ({sizes[0]}), found one of another "
                    f"({sizes[1]}), with other {name}: build it again with ovq context build"
                )
            while isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
                place = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
                name, ours, theirs = f"{name}[{place}]", ours[place], theirs[place]
            raise ValueError(
                f"{where}: expected a context made with {name}={ours!r:.100}, as the model has, "
                f"found {name}={theirs!r:.100}"
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


def _config_of(
    where: str | os.PathLike, metadata: Mapping[str, str], kind: Kind, made: Callable[[dict[str, Any]], Any]
) -> Any:
    """`made`, called with the upgraded config fields in a file's metadata; ValueError if they are invalid."""
    found = metadata.get("config", "")
    try:
        return made(kind.upgraded(json.loads(found)))
    except (AttributeError, StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected the config of a model, found {found!r:.500} ({error})"
        ) from error


def checked_layers(
    where: str, tensors: Tensors, kind: Kind, config: Any, dtype: torch.dtype, num_tokens: int
) -> list[dict[str, Tensor]]:
    """The tensors of each layer; ValueError unless they can be a model's memory of `num_tokens` tokens."""
    num_layers = len(kind.cache(config).layers)
    # Every layer has at least one tensor. Without this check, a file could claim any number of layers.
    if num_layers > len(tensors):
        raise ValueError(f"{where}: expected tensors of {num_layers} layers, found {len(tensors)} tensors")
    layers: list[dict[str, Tensor]] = [{} for _ in range(num_layers)]
    for name, tensor in tensors.items():
        found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if found is None or int(found[1]) >= num_layers:
            raise ValueError(f"{where}: expected tensors of {num_layers} layers, found {name!r}")
        layers[int(found[1])][found[2]] = tensor
    layers = [kind.tensors(own) for own in layers]
    kind.check(where, layers, config, dtype, num_tokens)
    return layers
