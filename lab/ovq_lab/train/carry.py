"""Training that carries the state of the model from window to window of a document (truncated BPTT).

The gradient stops at the beginning of a window, so a step needs the memory of one window and of the state,
however long the documents are. The context of a window still reaches back to the first token of its document.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ovq.hf import OVQCache, OVQConfig, OVQForCausalLM
from ovq.ops.serialization import write_file
from ovq_lab.train.checkpoints import SealingTrainer

_FILE = "carried-{}.safetensors"
"""Name of the file in a checkpoint that holds the lanes of one process, by the rank of the process."""


class CarryTrainer(SealingTrainer):
    """The `Trainer` for a `CarriedTextDataset`: each window starts from the current state of its lane.

    A checkpoint holds the states of all lanes, one file per process, so that a resumed run has the losses of
    an uninterrupted one, on any number of processes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._carried: dict[int, OVQCache] = {}

    @property
    def _config(self) -> OVQConfig:
        assert isinstance(self.model, OVQForCausalLM)
        return self.model.config

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a window, starting from the state of its lane, which is then updated."""
        if "lane" not in inputs:
            # Held-out windows start from an empty state.
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        window = dict(inputs)
        lane, num_read, is_last = (window.pop(name) for name in ("lane", "num_read", "is_last"))
        cache = self._carried.pop(lane, None) if num_read else OVQCache(self._config)
        if cache is None or cache.get_seq_length() != num_read:
            found = "none" if cache is None else f"that of {cache.get_seq_length()}"
            raise ValueError(f"lane {lane}: expected the state of {num_read} tokens, found {found}")
        window |= {"past_key_values": cache, "use_cache": True}
        result = super().compute_loss(model, window, return_outputs, num_items_in_batch)
        # The next window must neither keep the graph of this one in memory nor send gradients into it.
        cache.detach_()
        if not is_last:
            self._carried[lane] = cache
        return result

    def _save_rng_state(self, output_dir: str) -> None:
        # Called in every process, before the seal is written: each process saves its lanes here.
        super()._save_rng_state(output_dir)
        path = Path(output_dir) / _FILE.format(self.args.process_index)
        save_lanes(path, self._carried)

    def load_carried(self, checkpoint: Path) -> None:
        """Load the states in a checkpoint; each process takes the lanes that it will read."""
        num_processes, rank = self.args.world_size, self.args.process_index
        for path in sorted(checkpoint.glob(_FILE.format("*"))):
            self._carried |= {
                lane: cache
                for lane, cache in load_lanes(path, self._config, self.args.device).items()
                # The windows of a batch are assigned to the processes round-robin.
                if lane % num_processes == rank
            }


def save_lanes(path: Path, lanes: dict[int, OVQCache]) -> None:
    """Save the states of lanes in a file."""
    tensors = {
        f"{lane}.{i}.{name}": tensor
        for lane, cache in lanes.items()
        for i, layer in enumerate(cache.layers)
        for name, tensor in layer.tensors().items()
    }
    lengths = {str(lane): cache.get_seq_length() for lane, cache in lanes.items()}
    write_file(path, tensors, metadata={"num_read": json.dumps(lengths)})


def load_lanes(path: Path, config: OVQConfig, device: torch.device | str) -> dict[int, OVQCache]:
    """Load the states of lanes from a file of `save_lanes`."""
    lanes: dict[int, OVQCache] = {}
    with safe_open(path, framework="pt") as file:
        lengths = json.loads(file.metadata()["num_read"])
        parts: dict[tuple[str, int], dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118  (the file is no dictionary)
            match = re.fullmatch(r"(\d+)\.(\d+)\.(.+)", key)
            assert match is not None, "a key of `save_lanes`"
            lane, number, name = match.groups()
            parts.setdefault((lane, int(number)), {})[name] = file.get_tensor(key)
        for lane, num_read in lengths.items():
            cache = lanes[int(lane)] = OVQCache(config)
            for i, layer in enumerate(cache.layers):
                layer.restore(parts[lane, i], num_read, device)
    return lanes
