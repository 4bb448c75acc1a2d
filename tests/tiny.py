"""The smallest run that tests of commands, figures and processes train, and the losses that it recorded."""

import json

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
