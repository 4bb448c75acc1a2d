"""The smallest models, the smallest run that tests train, and the losses that it recorded."""

import json

import torch

from ovq.byte_tokens import byte_tokenizer
from ovq.hf import OVQConfig, OVQForCausalLM

TINY = [
    "train.steps=4",
    "train.batch_size=4",
    "train.lengths=16,24",
    "train.length_shares=0.5,0.5",
    "train.warmup_steps=1",
    "train.log_every=1",
    "train.save_every=2",
    "model.hidden_size=16",
    "model.intermediate_size=16",
    "model.head_dim=8",
    "model.num_slots=4",
    "model.chunk_size=4",
]
"""Fields that differ from those of a recipe; the same field again after these counts."""


def losses(folder):
    """The losses of all steps that a run in this folder recorded."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def tiny_model(seed=0, **fields):
    """A model with random weights, in evaluation mode: two layers of width 16 where `fields` say nothing."""
    sizes = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes["num_hidden_layers"] = len(fields["mixer_types"]) if "mixer_types" in fields else 2
    torch.manual_seed(seed)
    return OVQForCausalLM(OVQConfig(**sizes | fields)).eval()


def save_reader(folder, seed=0, **fields):
    """Save such a model, which reads bytes, with its tokenizer; returns the folder."""
    tiny_model(seed, **fields).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
