"""Runs that start from the weights of a saved model: compatibility checks, and loading."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ovq.hf import OVQConfig, OVQForCausalLM
from ovq.hf.hub import check_loaded, check_source
from ovq.hf.pretrained import WITHOUT_EFFECT
from ovq.layers.registry import fields_of_mixers, mixer_class
from ovq_lab.mixers import MIXERS
from ovq_lab.text import get_tokenizer
from ovq_lab.train.config import ModelArgs

# Fields that may change in further training: weights keep their shapes and meaning.
_FREE = {
    *("num_slots", "chunk_size", "growth", "init", "merge", "logn_length", "state_dtype", "ablation"),
    *("value_weight", "sliding_window", "num_sinks", "sink_window", "vq_decay", "commitment_weight"),
    *("kvm_chunk_size", "kvm_window_chunks", "kvm_growth", "kvm_sinks", "kvm_norm_leak"),
    *("raven_top_k", "raven_noise", "mesa_steps"),
}
# A tied output layer has other weights; the number of layers is that of `mixer_types`, compared by itself.
_WITHOUT_EFFECT = (WITHOUT_EFFECT - {"tie_word_embeddings"}) | {"num_hidden_layers"}


def check_initial(source: str, config: OVQConfig) -> list[str]:
    """Check from its config that a run can start from the weights of a model.

    Returns:
        Descriptions of the permitted differences between the run and the model.

    Raises:
        ValueError: If there is no such model, it is no OVQ model, or one of another architecture; names the
            first field that differs, and the option that would make both equal.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        # For an empty folder, transformers would return a default config.
        raise ValueError(
            f"train.init_from: expected the folder of a saved model, found no config.json in {source}"
        )
    check_source(source, flag="train.init_from")
    try:
        saved, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        # Offline, transformers does not say which model it could not find.
        raise ValueError(f"train.init_from: expected a saved model, found {source!r} ({error})") from error
    if (kind := saved.get("model_type")) != OVQConfig.model_type:
        # Checked first, because transformers would print a long warning.
        raise ValueError(
            f"train.init_from: expected a model of type {OVQConfig.model_type!r}, found {kind!r} in {source}"
        )
    found = OVQConfig.from_pretrained(source)
    settable = {field.name for field in dataclasses.fields(ModelArgs)}
    settable |= fields_of_mixers(config.mixer_types).keys()
    free = _FREE - {"num_slots"} if "vq" in config.mixer_types else _FREE
    notes = []
    # Fields that no layer of this model uses have no effect either.
    of_all, of_these = (
        {field for cls in classes for field in cls.config_fields.values() if isinstance(field, str)}
        for classes in (MIXERS.values(), map(mixer_class, config.mixer_types))
    )
    without_effect = _WITHOUT_EFFECT | (of_all - of_these)
    # `mixer_types` is compared before the fields of mixers.
    for name in OVQConfig.field_defaults(config.mixer_types):
        ours, theirs = getattr(config, name), getattr(found, name)
        if name in without_effect or ours == theirs:
            continue
        if name in free:
            notes.append(f"{name} is {ours} in this run, and was {theirs} in {source}")
            continue
        text = ",".join(theirs) if isinstance(theirs, list) else theirs
        hint = f" (--set model.{name}={text})" if name in settable else ""
        if name == "vocab_size":
            hint = f" (for text: --set task.tokenizer={source})"
        raise ValueError(
            f"train.init_from: expected a model with {name} {ours}, as in this run, "
            f"found {theirs} in {source}{hint}"
        )
    return notes


def load_initial(source: str, model: OVQForCausalLM, tokenizer: Any | None) -> None:
    """Load the weights of a saved model into the model of a run.

    Raises:
        OSError: If there are no weights.
        ValueError: If weights are missing or unexpected, or the saved tokenizer has other token ids than
            `tokenizer`, the tokenizer of the run (None without text).
    """
    if tokenizer is not None and get_tokenizer(source).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"train.init_from: expected a model with the tokenizer of this run, found another in {source} "
            f"(--set task.tokenizer={source})"
        )
    # With `output_loading_info` it returns a pair, contrary to its annotation.
    loaded: Any = OVQForCausalLM.from_pretrained(
        source,
        config=model.config,
        output_loading_info=True,
        # Refused by `check_loaded`, which names the weights.
        ignore_mismatched_sizes=True,
    )
    saved, report = loaded
    check_loaded(source, report)
    # Copied, so that trained weights stay in float32, whatever dtype was saved.
    model.load_state_dict(saved.state_dict())
