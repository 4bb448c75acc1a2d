"""States in vLLM's blocks: one block of constant size per request and OVQ layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ovq.hf import OVQConfig
from ovq.hf.block import build_mixer
from ovq.layers import Mixer, OVQAttention
from ovq.layers.constant import ConstantStateMixer
from ovq.layers.memory import StateSpec, num_bytes
from ovq.ops import OVQState
from ovq.ops.parts import slot_spec
from ovq.ops.state import SLOT_TENSORS
from ovq_vllm.step import Group

_PENDING = ("pending_keys", "pending_values", "pending_weights")


def block_spec(config: OVQConfig, dtype: torch.dtype) -> StateSpec:
    """Specification of an OVQ layer's block, in storage order: wide dtypes first, so that all are aligned.

    All slots are allocated from the start. Besides the state and the last inputs of the layer's convolution,
    a block holds tensors of the other layers, each a *guest* of one OVQ layer: vLLM would give each guest,
    often a few KiB, a block as large as this one.

    Args:
        config: the config of the model.
        dtype: dtype of the activations.
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
        state_dtype=config.state_dtype,
    )
    # The engine counts the tokens.
    del spec["num_seen"]
    with torch.device("meta"):
        mixers = [build_mixer(config, i) for i in range(len(config.mixer_types))]
    for mixer, (_, index) in zip(mixers, hosts(config.mixer_types), strict=True):
        is_constant = isinstance(mixer, ConstantStateMixer)
        for name, part in mixer.state_spec(1, dtype).items():
            # Slots are above, and keys and values in pages.
            if is_constant or name == "conv_state":
                spec[part_name(mixer, name, index)] = part
    spec = dict(sorted(spec.items(), key=lambda item: -item[1][1].itemsize))
    if missing := -num_bytes(spec) % 8:
        spec["padding"] = ((missing,), torch.uint8)
    return spec


def hosts(mixer_types: Sequence[str]) -> list[tuple[int, int]]:
    """Host of each layer (the OVQ layer whose blocks store its tensors) and index there (0: the host's own).

    Example:
        >>> hosts(["mamba2", "ovq", "mamba2", "ovq", "mamba2"])
        [(1, 1), (1, 0), (3, 1), (3, 0), (1, 2)]
    """
    own = [i for i, name in enumerate(mixer_types) if name == "ovq"]
    # Guests are dealt to the hosts in turn.
    guests = ((host, index) for index in range(1, len(mixer_types)) for host in own)
    return [(i, 0) if name == "ovq" else next(guests) for i, name in enumerate(mixer_types)]


def part_name(mixer: Mixer, name: str, index: int) -> str:
    """Name in a block of a layer's tensor. Layers of one type and index share it, as their hosts differ."""
    return f"{type(mixer).__name__}.{name}.{index}"


class StateBlocks:
    """Reads and writes the states of requests.

    Args:
        mixer: the mixer of the layer.
        tensors: `[blocks, ...]` views of the blocks, by the names in `block_spec`.
    """

    def __init__(self, mixer: OVQAttention, tensors: dict[str, Tensor]) -> None:
        self._mixer = mixer
        self._tensors = tensors
        self._names = [name for name in (*SLOT_TENSORS, *_PENDING, "pending_forget") if name in tensors]
        # Blocks, tokens read and states after the last decode step. While the same requests continue, states
        # are not read from blocks (which stay up to date), and the library repeats its step without checking
        # the arguments again. Only block and token numbers are compared, so this is dropped when a block may
        # hold another request that has read as many tokens.
        self._last: tuple[tuple[int, ...], tuple[int, ...], OVQState] | None = None

    def read(self, group: Group) -> OVQState:
        """States of a group of requests before its new tokens."""
        if not group.is_packed and self._last is not None:
            block_ids, num_seen, state = self._last
            if (block_ids, num_seen) == (group.block_ids, group.num_seen):
                return state
        if group.fresh:
            # Remove what a former request has left.
            fresh = group.blocks[group.fresh]
            for name in self._names:
                self._tensors[name][fresh] = 0
        capacity = max(map(self._mixer.num_open, group.num_seen))
        parts = {name: self._part(name, capacity).index_select(0, group.blocks) for name in self._names}
        parts["num_seen"] = torch.tensor(group.num_seen)
        return self._mixer.memory.restored(parts, None)

    def write(self, group: Group, state: OVQState) -> None:
        """Store the states of a group after its new tokens."""
        if group.is_packed:
            self._write_rows(group.blocks, state, list(range(len(group.block_ids))), self._names)
            if self._last and not set(self._last[0]).isdisjoint(group.block_ids):
                self._last = None
            return
        self._last = None if group.is_at_end else (group.block_ids, group.num_after, state)
        size = state.chunk_size
        # A decode step adds one pending token; the others are in the block already.
        rows = torch.arange(len(group.block_ids), device=group.blocks.device)
        places = torch.tensor([seen % size for seen in group.num_seen], device=group.blocks.device)
        for name in self._names:
            if name in _PENDING:
                self._tensors[name][group.blocks, :, places] = getattr(state, name)[rows, :, places]
        if completed := [row for row, after in enumerate(group.num_after) if after % size == 0]:
            sums = [name for name in self._names if name in SLOT_TENSORS]
            self._write_rows(group.blocks[completed], state, completed, sums)
        if "pending_forget" in self._names:
            self._tensors["pending_forget"][group.blocks] = state.pending_forget

    def _write_rows(self, blocks: Tensor, state: OVQState, rows: list[int], names: list[str]) -> None:
        for name in names:
            tensor = getattr(state, name)
            own = tensor if len(rows) == len(tensor) else tensor[rows]
            self._part(name, state.count.shape[2])[blocks] = own

    def _part(self, name: str, capacity: int) -> Tensor:
        """A tensor for all blocks; sums only of the first `capacity` slots."""
        tensor = self._tensors[name]
        return tensor[:, :, :capacity] if name in SLOT_TENSORS else tensor
