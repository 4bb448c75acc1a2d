"""Training with several processes: the settings of transformers' Trainer that shard the model with FSDP2.

Sharding, sharded checkpoints, and loading them with another number of processes are PyTorch's (`fully_shard`,
`torch.distributed.checkpoint`), used through accelerate.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import Trainer, TrainingArguments

from ovq_lab.train.config import TrainArgs

# The name changed in transformers 5.24.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in inspect.signature(TrainingArguments).parameters
)


def is_first_process() -> bool:
    """Whether this is the main process, by the rank that torchrun and accelerate set."""
    return os.environ.get("RANK", "0") == "0"


def sharding_arguments(args: TrainArgs) -> dict[str, Any]:
    """The arguments of `TrainingArguments` for `train.sharding` and `train.use_gradient_checkpointing`.

    Example:
        >>> sharding_arguments(TrainArgs())
        {}
    """
    if args.sharding == "none":
        return {_CHECKPOINTING: True} if args.use_gradient_checkpointing else {}
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            f"train.sharding: expected a run started by torchrun or accelerate launch for {args.sharding!r}, "
            "found a single process (torchrun --nproc-per-node 1 starts one that can)"
        )
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["OVQBlock"],
        # Each process writes the part it holds, and any number of processes can read it.
        "state_dict_type": "SHARDED_STATE_DICT",
        # FSDP's own checkpointing: the Trainer's would gather the weights of each layer once more.
        "activation_checkpointing": args.use_gradient_checkpointing,
    }
    return {"fsdp": True, "fsdp_config": config}


def prepare_sharding(arguments: TrainingArguments) -> None:
    """Set what `TrainingArguments` has no field for; call it before the Trainer is created.

    Mixed precision sums gradients in float32 and leaves the loss as it is; accelerate's default would round
    both to bfloat16. Processes without a GPU may shard a model too. accelerate supports FSDP on accelerators
    only: on a CPU it silently leaves the whole model in every process, although PyTorch's `fully_shard` works
    there. Its state is therefore created here, with the values it would have on a GPU.
    """
    if not arguments.fsdp:
        return
    if arguments.bf16:
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )
    if arguments.device.type == "cpu":
        plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
        precision = "bf16" if arguments.bf16 else "no"
        # All Accelerator objects of a process, including the Trainer's, share these two states.
        state = Accelerator(cpu=True, mixed_precision=precision, fsdp_plugin=plugin).state
        state.fsdp_plugin = plugin
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def gather_weights(trainer: Trainer) -> None:
    """Make `trainer.save_model` gather the shards and write one whole model."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
