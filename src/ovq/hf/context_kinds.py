"""What models are to be contexts of: what is asked of them, and how their memories are checked.

OVQ models are one kind; `ovq.convert` adds its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ovq.hf.cache import OVQCache, StateCache
from ovq.hf.configuration_ovq import OVQConfig
from ovq.hf.modeling_ovq import OVQModel
from ovq.hf.pretrained import WITHOUT_EFFECT

Tensors = Mapping[str, Tensor]


class TokenModel(Protocol):
    """A model that reads token ids."""

    config: Any

    @property
    def device(self) -> torch.device:
        """Where inputs go."""


class ContextModel(TokenModel, Protocol):
    """What contexts need of a model: an `OVQModel` or `OVQForCausalLM`, or a converted model."""

    context_kind: str

    @property
    def base_model(self) -> Any:
        """The model without its output layer."""

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


def _upgraded_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of an `OVQConfig` in a file; one that is older than a field was made with its default of now."""
    fields = OVQConfig.upgraded(fields)
    defaults = OVQConfig.field_defaults(fields.get("mixer_types"))
    return {name: value for name, value in defaults.items() if name not in WITHOUT_EFFECT} | fields


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
