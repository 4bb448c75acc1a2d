"""Which model, and which tensors, a context is of: SHA-256 of weights and contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ovq.hf.context_kinds import ContextModel


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
    """SHA-256 of names, dtypes, shapes and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
