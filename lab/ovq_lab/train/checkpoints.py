"""Sealed checkpoints: incomplete or damaged ones are detected and not used.

A checkpoint is a folder of files that are written one after the other. When all of them are on the disk, a
list of their sizes and SHA-256 digests is written beside them: the seal. A folder without a seal was left by
an interrupted save; one that does not match its seal is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from ovq.runtime.files import read_json, write_atomic, writing

SEAL_FILE = "seal.json"

_NUM_KEPT = 2

# In transformers 5.17, several processes on a CPU load the state of the optimizer to "cpu:0", which
# torch.load does not accept; 5.24 passes "cpu".
torch.serialization.register_package(
    11, lambda _: None, lambda storage, location: storage if location == "cpu:0" else None
)


def seal(folder: Path, *, with_subfolders: bool = False) -> None:
    """Write the seal of a complete checkpoint.

    Args:
        with_subfolders: Whether subfolders are parts of it, as in sharded checkpoints; otherwise their
            contents may change.
    """
    found = folder.rglob("*") if with_subfolders else folder.iterdir()
    paths = sorted(path for path in found if path.is_file() and path.name != SEAL_FILE)
    for path in paths:
        # Flushed to disk before the seal is written; otherwise a power cut could leave a seal over empty
        # files.
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in paths
    }
    write_atomic(folder / SEAL_FILE, json.dumps(entries, indent=2) + "\n")


def fault(folder: Path) -> str | None:
    """Describe what is wrong with the checkpoint in a folder; None if it is complete and undamaged."""
    try:
        entries = dict(read_json(folder / SEAL_FILE))
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file():
                return f"{name}: expected a file, found none"
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{name}: expected {entry['bytes']} bytes, found {size}"
            if _digest(path) != entry["sha256"]:
                return f"{name}: expected the SHA-256 of its seal, found another"
    except FileNotFoundError:
        return f"it was never finished: it has no {SEAL_FILE}"
    except (ValueError, TypeError, KeyError) as error:
        return f"{SEAL_FILE}: expected a list of files, found something else ({error})"
    return None


def newest_checkpoint(out: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint in the folder of a run, or None; `say` reports newer ones it skips."""
    for folder in reversed(_by_step(out)):
        found = fault(folder)
        if found is None:
            return folder
        say(f"{folder}: skipped, as it is incomplete or damaged ({found})")
    return None


def finished_checkpoints(out: Path) -> list[Path]:
    """All sealed checkpoints in the folder of a run, damaged or not, earliest step first."""
    return [folder for folder in _by_step(out) if (folder / SEAL_FILE).is_file()]


class SealingTrainer(Trainer):
    """The `Trainer` of transformers, with checkpoints that are sealed once they are complete.

    It keeps the newest two sealed checkpoints of a run. One that cannot be written is removed, which frees
    its space on a full disk.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_MoreLogs())

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Names of the parameters with weight decay: matrices that their authors do not exempt.

        transformers selects by name, and would decay the log decay rates, temperatures and skips of KVM,
        Mamba2 and the delta rules, whose authors exempt them. mamba-ssm and flash-linear-attention mark such
        parameters with `_no_weight_decay`.
        """
        decayed = {
            name
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and not getattr(parameter, "_no_weight_decay", False)
        }
        return [name for name in super().get_decay_parameter_names(model) if name in decayed]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch, without the logits of positions that have no target."""
        return super().compute_loss(model, inputs | {"skip_logits": True}, return_outputs, num_items_in_batch)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.args.output_dir is not None
        out = Path(self.args.output_dir)
        folder = out / f"checkpoint-{self.state.global_step}"
        # The folder may exist from before the run was resumed; its seal is no longer valid.
        (folder / SEAL_FILE).unlink(missing_ok=True)
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
                # Every process writes its own random state.
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    if self.is_fsdp_enabled and self.processing_class is not None:
                        # The Trainer saves the tokenizer with unsharded models only.
                        self.processing_class.save_pretrained(folder)
                    seal(folder, with_subfolders=True)
        except OSError:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if self.args.should_save:
            # The Trainer itself would do so before the newest one is sealed, and count incomplete ones.
            kept = finished_checkpoints(out)[-_NUM_KEPT:]
            for old in _by_step(out):
                if old not in kept:
                    shutil.rmtree(old)


class _MoreLogs(TrainerCallback):
    """Logs the loss at every checkpoint and at the end.

    A logged loss is the mean since the previous log. A checkpoint does not hold the running sum, so the first
    loss of a resumed run would otherwise be the mean of fewer steps than without the interruption. Steps
    after the last log would not show whether the run has diverged.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Request a log, which the Trainer writes before the checkpoint."""
        control.should_log |= control.should_save or control.should_training_stop


def _by_step(out: Path) -> list[Path]:
    """All checkpoint folders, earliest step first."""
    folders = (path for path in out.glob("checkpoint-*") if path.is_dir())
    by_step = {path.name.removeprefix("checkpoint-"): path for path in folders}
    return [by_step[step] for step in sorted(filter(str.isdecimal, by_step), key=int)]


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            total.update(piece)
    return total.hexdigest()
