"""`Preset`: a memory with the model that it was probed for, on disk and found again for a model.

A model is recognised by the sizes of its layers and a sample of its weights. Neither depends on the tokenizer
or on how weights are stored, so that a copy is recognised that was quantised, or whose vocabulary was padded.
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

#: A preset is for as many rows as are asked for, within this share of them.
MAX_MISMATCH = 0.05

_FORMAT = 1
_JSON, _TENSORS, _CARD = "preset.json", "preset.safetensors", "README.md"
_SAMPLE = "weight_sample"
_FIELDS = {
    "model": (str, "a string"),
    "memory": (dict, "an object"),
    "identity": (dict, "an object"),
    "measured": (dict, "an object"),
}
# Fields that say what the heads of a model are like.
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
# Matrices that are looked at, and numbers of each.
_NUM_MATRICES = 8
_NUM_WEIGHTS = 64
# In GGUF files numbers of the config are float32.
_DIGITS = 6
# Copies that were quantised to 4 bits have 0.99 and more, other models about 0.
_LEAST_LIKENESS = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Preset:
    """A memory as a probe has found it, and the model it is for.

    Attributes:
        name: that of its folder.
        model: the model's name.
        config: the memory.
        identity: sizes of the model, see `identity`.
        sample: a few of its weights, see `weight_sample`.
        measured: what was measured, and how, as JSON has it, see `preset_card`.
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
        """The preset of a model, converted or not, that a memory was probed for."""
        # `attach` finds these out.
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
        """Raise ValueError unless this is a preset of the model, or of one that it is a copy of."""
        if (found := self._difference(model)) is not None:
            raise ValueError(f"preset {self.name}: expected a copy of {self.model}, {found}")

    def _difference(self, model: PreTrainedModel) -> str | None:
        """In what the model is another one, in words; None for a copy."""
        found = identity(model)
        if differing := [k for k, v in self.identity.items() if found.get(k) != v]:
            return "with " + ", ".join(f"{k} {self.identity[k]} (found {found.get(k)})" for k in differing)
        if (alike := likeness(self.sample, weight_sample(model))) < _LEAST_LIKENESS:
            return (
                f"found a model of the same sizes with other weights (likeness {alike:.2f}, at least "
                f"{_LEAST_LIKENESS} expected)"
            )
        return None


def save_preset(preset: Preset, folder: str | os.PathLike) -> None:
    """Write a preset and its card into a folder, which is made if necessary.

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
    for name, (kind, called) in _FIELDS.items():
        if not isinstance(found := content.get(name), kind):
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
        [256, 512, 768]
    """
    folders = (path.parent for path in Path(__file__).parent.glob(f"*/{_JSON}"))
    return tuple(sorted(map(load_preset, folders), key=lambda preset: (preset.model, preset.rows)))


def presets_of(model: PreTrainedModel) -> list[Preset]:
    """The presets of the package that are of this model, which is not converted yet."""
    return [preset for preset in packaged_presets() if preset._difference(model) is None]


def find_preset(model: PreTrainedModel, rows: float) -> Preset | None:
    """The preset of the package that is of this model, with about as many rows per head; None if none is.

    Args:
        model: not converted yet.
        rows: rows per head, on average; a preset may have up to 5 % more or fewer.
    """
    near = [p for p in presets_of(model) if abs(p.rows - rows) <= MAX_MISMATCH * rows]
    return min(near, key=lambda p: abs(p.rows - rows), default=None)


def _as_tensor(value: list[Any]) -> Tensor:
    """Lists of numbers, so that `tolist` gives the same ones again."""
    tensor = torch.tensor(value)
    if tensor.is_floating_point():
        return torch.tensor(value, dtype=torch.float64)
    is_small = bool((tensor.abs() < 128).all())
    return tensor.to(torch.int8 if is_small else torch.int32)


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of a model's config that say what its heads are like, as JSON has them.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> found = identity(LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)))
        >>> found["model_type"], found["head_dim"], found["rope"]
        ('llama', 8, {'rope_theta': 10000.0, 'rope_type': 'default'})
    """
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
    """A few weights of matrices at all depths, `[n]`, each matrix with a mean square of 1."""
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
    """How alike samples of weights are: 1 for the same, near 0 for models that were trained apart."""
    if first.shape != second.shape:
        return 0.0
    return float(torch.nn.functional.cosine_similarity(first.double(), second.double(), dim=0))
