"""Presets: memory configs found by a probe of a pretrained model, to convert the same model without a probe.

A preset is a folder with `preset.json`, `preset.safetensors` and a card. Those in this folder come with the
package. A model is recognised by the sizes of its layers and a sample of its weights. Neither depends on the
tokenizer or on how weights are stored, so copies that were quantised or have a padded vocabulary are
recognised.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from ovq.convert.config import MemoryConfig
from ovq.convert.presets.card import preset_card
from ovq.ops.serialization import write_file
from ovq.runtime.files import read_json, write_atomic

# Largest relative difference between a preset's rows per head and the requested ones.
_MAX_MISMATCH = 0.05
_FORMAT = 1
_JSON, _TENSORS, _CARD = "preset.json", "preset.safetensors", "README.md"
_SAMPLE = "weight_sample"
_FIELDS = {"model": str, "memory": dict, "identity": dict, "measured": dict}
# Config fields that identify a model's heads.
_IDENTITY = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
# Number of sampled matrices, and of weights of each.
_NUM_MATRICES = 8
_NUM_WEIGHTS = 64
# Significant digits of config values, which GGUF files store in float32.
_DIGITS = 6
# Smallest cosine similarity of a copy: 4-bit quantised copies have at least 0.99, other models about 0.
_LEAST_LIKENESS = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Preset:
    """A memory config found by a probe, and the model that it is for.

    Attributes:
        name: name of its folder.
        model: name of the model.
        config: the memory.
        identity: sizes of the model, see `identity`.
        sample: a few of the model's weights, see `weight_sample`.
        measured: measurements and their conditions, as JSON types, see `preset_card`.
    """

    name: str
    model: str
    config: MemoryConfig
    identity: dict[str, Any]
    sample: Tensor
    measured: dict[str, Any]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        config: MemoryConfig,
        *,
        name: str,
        model_name: str,
        measured: dict[str, Any] | None = None,
    ) -> Preset:
        """A preset with the config `config`, for `model`, which may be converted or not."""
        # `attach` fills these in.
        plain = dataclasses.replace(config, trained_length=None, rotary_frequencies=None)
        return cls(
            name=name,
            model=model_name,
            config=plain,
            identity=identity(model),
            sample=weight_sample(model),
            measured=measured or {},
        )

    @property
    def rows(self) -> int:
        """Rows per head, on average."""
        return round(self.config.rows_per_head)

    def check(self, model: PreTrainedModel) -> None:
        """Raise ValueError unless the model is the preset's model or a copy of it."""
        if (found := self._difference(model)) is not None:
            raise ValueError(f"preset {self.name}: expected a copy of {self.model}, {found}")

    def _difference(self, model: PreTrainedModel) -> str | None:
        """How the model differs from the preset's, as part of an error message; None for a copy."""
        found = identity(model)
        if differing := [k for k, v in self.identity.items() if found.get(k) != v]:
            return "with " + ", ".join(f"{k} {self.identity[k]} (found {found.get(k)})" for k in differing)
        if not (alike := likeness(self.sample, weight_sample(model))) >= _LEAST_LIKENESS:
            return (
                f"found a model of the same sizes with other weights (likeness {alike:.2f}, at least "
                f"{_LEAST_LIKENESS} expected)"
            )
        return None


def save_preset(preset: Preset, folder: str | os.PathLike) -> None:
    """Write a preset and its card into a folder, which is created if necessary.

    Raises:
        OSError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
        >>> config = MemoryConfig(num_slots=[[8, 0]], window=[[32, 64]], slot_bias=[[0.1, -0.3]])
        >>> folder = tempfile.mkdtemp()
        >>> save_preset(Preset.of(model, config, name="small", model_name="mine"), folder)
        >>> found = load_preset(folder)
        >>> found.check(model)
        >>> found.config == config
        True
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = preset.config.to_dict()
    tensors = {name: _as_tensor(value) for name, value in fields.items() if isinstance(value, list)}
    content = {
        "format": _FORMAT,
        "model": preset.model,
        "rows_per_head": preset.config.rows_per_head,
        "identity": preset.identity,
        "memory": {k: v for k, v in fields.items() if k not in tensors and v is not None},
        "measured": preset.measured,
    }
    write_file(
        folder / _TENSORS, {**tensors, _SAMPLE: preset.sample.float()}, metadata={"format": "ovq-preset"}
    )
    write_atomic(folder / _JSON, json.dumps(content, indent=2) + "\n")
    write_atomic(
        folder / _CARD,
        preset_card(name=preset.name, model=preset.model, config=preset.config, measured=preset.measured),
    )


def load_preset(folder: str | os.PathLike) -> Preset:
    """The preset in a folder.

    Raises:
        OSError: if there is none.
        ValueError: if its files are damaged, or of a later version.
    """
    folder = Path(folder)
    if not (folder / _JSON).is_file():
        raise FileNotFoundError(f"{folder}: expected a preset, found no {_JSON} in it")
    content = read_json(folder / _JSON)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{folder / _JSON}: expected a preset of format {_FORMAT}, found another file")
    for name, kind in _FIELDS.items():
        if not isinstance(found := content.get(name), kind):
            called = "a string" if kind is str else "an object"
            raise ValueError(f"{folder / _JSON}: {name}: expected {called}, found {found!r:.80}")
    try:
        tensors = load_file(folder / _TENSORS)
        lists = {name: tensor.tolist() for name, tensor in tensors.items() if name != _SAMPLE}
        return Preset(
            name=folder.resolve().name,
            model=content["model"],
            config=MemoryConfig.from_dict({**content["memory"], **lists}),
            identity=content["identity"],
            sample=tensors[_SAMPLE],
            measured=content["measured"],
        )
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder}: expected a preset, found damaged files ({error})") from error


@functools.cache
def packaged_presets() -> tuple[Preset, ...]:
    """The presets that come with the package.

    Example:
        >>> [preset.rows for preset in packaged_presets()]
        [256, 512, 768, 1100]
    """
    folders = (path.parent for path in Path(__file__).parent.glob(f"*/{_JSON}"))
    return tuple(sorted(map(load_preset, folders), key=lambda preset: (preset.model, preset.rows)))


def presets_of(model: PreTrainedModel) -> list[Preset]:
    """The presets of the package for this model, which is not converted yet."""
    return [preset for preset in packaged_presets() if preset._difference(model) is None]


def find_preset(model: PreTrainedModel, rows: float) -> Preset | None:
    """The packaged preset for this model whose rows per head are closest to `rows`; None if there is none.

    Args:
        model: a model that is not converted yet.
        rows: average rows per head; a preset may have up to 5 % more or fewer.
    """
    near = [p for p in presets_of(model) if abs(p.rows - rows) <= _MAX_MISMATCH * rows]
    return min(near, key=lambda p: abs(p.rows - rows), default=None)


def _as_tensor(value: list[Any]) -> Tensor:
    """Lists of numbers as a tensor, such that `tolist` returns the same numbers."""
    tensor = torch.tensor(value)
    if tensor.is_floating_point():
        return torch.tensor(value, dtype=torch.float64)
    is_small = bool((tensor.abs() < 128).all())
    return tensor.to(torch.int8 if is_small else torch.int32)


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of a model's config that identify its heads, as JSON types."""
    config = model.config
    found = {name: getattr(config, name, None) for name in _IDENTITY}
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    if found["head_dim"] is None and found["hidden_size"] and found["num_attention_heads"]:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    rope = getattr(config, "rope_parameters", None) or {}
    found["rope"] = {k: _rounded(v) for k, v in sorted(rope.items()) if v is not None}
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(f"{float(value):.{_DIGITS}g}") if is_number else value


@torch.no_grad()
def weight_sample(model: PreTrainedModel) -> Tensor:
    """A few weights `[n]` of matrices at all depths, scaled to a mean square of 1 per matrix."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.base_model.parameters() if p.dim() == 2 and p is not embedding]
    num = min(_NUM_MATRICES, len(matrices))
    chosen = torch.linspace(0, len(matrices) - 1, num, dtype=torch.float32).long()
    samples = []
    for index in chosen.tolist():
        weights = matrices[index].flatten()
        places = torch.linspace(0, len(weights) - 1, min(_NUM_WEIGHTS, len(weights)), dtype=torch.float64)
        sample = weights[places.long()].float().cpu()
        samples.append(sample / sample.square().mean().sqrt().clamp(min=1e-12))
    return torch.cat(samples)


def likeness(first: Tensor, second: Tensor) -> float:
    """Cosine similarity of weight samples: 1 for equal ones, near 0 for independently trained models."""
    if first.shape != second.shape:
        return 0.0
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))
