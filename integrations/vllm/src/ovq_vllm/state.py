"""The state of an OVQ layer in the blocks of vLLM: a block per request, of constant size."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.hf import OVQConfig
from ovq.layers import OVQAttention
from ovq.layers.memory import StateSpec, num_bytes
from ovq.ops import OVQState
from ovq.ops.parts import slot_spec
from ovq_vllm.step import Group

_SUMS = ("key_sum", "value_sum", "count", "weight")
_PENDING = ("pending_keys", "pending_values", "pending_weights")


def block_spec(config: OVQConfig, dtype: torch.dtype) -> StateSpec:
    """What a block of an OVQ layer holds, in this order: wide dtypes first, so that all lie aligned.

    All slots are there from the beginning. Besides the state and the last inputs of the layer's convolution,
    `conv_state.0`, there is room for those of the layers without a state, as vLLM would give each of these
    inputs, of some KiB, a block as large as this one.

    Args:
        config: that of the model.
        dtype: of the activations.
    """
    forgets = config.forget_gate
    spec = slot_spec(
        config.num_slots,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        chunk_size=config.chunk_size,
        dtype=dtype,
        has_weights=config.merge_gate or forgets,
        forgets=forgets,
    )
    # The engine counts tokens itself.
    del spec["num_seen"]
    if config.conv_size:
        width = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        for index in range(1 + guests_per_host(config)):
            spec[f"conv_state.{index}"] = ((width, config.conv_size - 1), dtype)
    spec = dict(sorted(spec.items(), key=lambda item: -item[1][1].itemsize))
    if missing := -num_bytes(spec) % 8:
        spec["padding"] = ((missing,), torch.uint8)
    return spec


def guests_per_host(config: OVQConfig) -> int:
    """How many layers of other kinds keep the inputs of their convolutions in the block of an OVQ layer."""
    num_hosts = config.mixer_types.count("ovq")
    return -(-(len(config.mixer_types) - num_hosts) // num_hosts)


class StateBlocks:
    """Reads and writes the states of requests.

    Args:
        mixer: the layer.
        tensors: `[blocks, ...]` views of the blocks, by the names of `block_spec`.
    """

    def __init__(self, mixer: OVQAttention, tensors: dict[str, Tensor]) -> None:
        self._mixer = mixer
        self._tensors = tensors
        self._names = [name for name in (*_SUMS, *_PENDING, "pending_forget") if name in tensors]
        # What the last decode step led to. As long as the same requests go on, nothing is read from blocks,
        # and the library repeats its step without looking at the arguments anew. Blocks are kept up to date.
        # Only their numbers are compared, so none may have got another state since: of another request that
        # has read as many tokens.
        self._last: tuple[tuple[int, ...], tuple[int, ...], OVQState] | None = None

    def read(self, group: Group) -> OVQState:
        """The states of a group of requests, before its new tokens."""
        if not group.is_packed and self._last is not None:
            block_ids, num_seen, state = self._last
            if (block_ids, num_seen) == (group.block_ids, group.num_seen):
                return state
        if group.fresh:
            # Whatever a request that is gone has left.
            fresh = group.blocks[group.fresh]
            for name in self._names:
                self._tensors[name][fresh] = 0
        capacity = max(map(self._mixer.num_open, group.num_seen))
        parts = {name: self._part(name, capacity).index_select(0, group.blocks) for name in self._names}
        parts["num_seen"] = torch.tensor(group.num_seen)
        return self._mixer.memory.restored(parts, None)

    def write(self, group: Group, state: OVQState) -> None:
        """Keep the states of a group after its new tokens."""
        if group.is_packed:
            self._write_rows(group.blocks, state, list(range(len(group.block_ids))), self._names)
            if self._last and not set(self._last[0]).isdisjoint(group.block_ids):
                self._last = None
            return
        self._last = None if group.is_at_end else (group.block_ids, group.num_after, state)
        size = state.chunk_size
        # Of a chunk that is not complete, one token is new.
        rows = torch.arange(len(group.block_ids), device=group.blocks.device)
        places = torch.tensor([seen % size for seen in group.num_seen], device=group.blocks.device)
        for name in self._names:
            if name in _PENDING:
                self._tensors[name][group.blocks, :, places] = getattr(state, name)[rows, :, places]
        if completed := [row for row, after in enumerate(group.num_after) if after % size == 0]:
            sums = [name for name in self._names if name in _SUMS]
            self._write_rows(group.blocks[completed], state, completed, sums)
        if "pending_forget" in self._names:
            self._tensors["pending_forget"][group.blocks] = state.pending_forget

    def _write_rows(self, blocks: Tensor, state: OVQState, rows: list[int], names: list[str]) -> None:
        for name in names:
            tensor = getattr(state, name)
            own = tensor if len(rows) == len(tensor) else tensor[rows]
            self._part(name, state.count.shape[2])[blocks] = own

    def _part(self, name: str, capacity: int) -> Tensor:
        """A tensor of all blocks; of sums, those of the first `capacity` slots."""
        tensor = self._tensors[name]
        return tensor[:, :, :capacity] if name in _SUMS else tensor
