"""Which model a preset is of: the sizes of its layers, and a sample of its weights.

Nothing here depends on the tokenizer or on how weights are stored, so that a copy is recognised that was
quantised, or whose vocabulary was padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

_FIELDS = (
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
    found = {name: getattr(config, name, None) for name in _FIELDS}
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
