"""`load`: a converted model from its folder. To save one, call its `save_pretrained`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from ovq.convert.attach import attach
from ovq.convert.config import CONFIG_KEY, MemoryConfig
from ovq.convert.step import checked_weight_dtype
from ovq.runtime.files import read_json


def load(folder: str | os.PathLike, *, weight_dtype: str | None = None, **options: Any) -> PreTrainedModel:
    """Load a converted model: its weights, and its memory as it was set and probed.

    The folder holds the model that was converted, whose config has one field more. So
    `AutoModelForCausalLM.from_pretrained` loads it as well, with full attention.

    Args:
        folder: where `save_pretrained` of a converted model, or `ovq convert`, has written.
        weight_dtype: the format of the weights, see `attach`.
        options: those of `AutoModelForCausalLM.from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        OSError: no model there.
        ValueError: a model that is not converted, sizes that do not fit it, or an unknown `weight_dtype`.

    Example:
        >>> import tempfile, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
        >>> model = attach(LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval(), num_slots=8)
        >>> folder = tempfile.mkdtemp()
        >>> model.save_pretrained(folder)
        >>> load(folder).memory_config == model.memory_config
        True
    """
    checked_weight_dtype(weight_dtype)
    found = memory_config_in(folder)
    if found is None:
        raise ValueError(
            f"{folder}: expected a converted model, found no {CONFIG_KEY} in its config.json: convert it "
            "with ovq.convert.attach, or ovq convert"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return attach(model.eval(), config=found, weight_dtype=weight_dtype)


def memory_config_in(folder: str | os.PathLike) -> MemoryConfig | None:
    """The memory's config in the folder of a model; None if there is none.

    Raises:
        ValueError: a damaged config.
    """
    path = Path(folder) / "config.json"
    try:
        fields = read_json(path)
    except OSError:
        return None
    if not isinstance(fields, dict) or CONFIG_KEY not in fields:
        return None
    return MemoryConfig.from_dict(fields[CONFIG_KEY])
