"""The losses of a run, as logged by the Trainer in its folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from ovq.runtime.files import read_json


@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
    """Losses by step."""

    training: dict[int, float]
    held_out: dict[int, float]

    @classmethod
    def load(cls, folder: Path) -> History:
        """Load the losses of a finished run."""
        entries = read_json(folder / TRAINER_STATE_NAME)["log_history"]
        return cls(
            training={entry["step"]: entry["loss"] for entry in entries if "loss" in entry},
            held_out={entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry},
        )
