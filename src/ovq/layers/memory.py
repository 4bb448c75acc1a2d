"""States of mixers: their tensors, and how they are saved, restored, concatenated and moved.

A *specification* lists the tensors of one row after a given number of tokens, with shapes and dtypes
(`Mixer.state_spec`). The size of a state in bytes, checks of files and messages between ranks are derived
from it. A *memory* implements the operations on states of one kind, for the caches that hold them.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovq.layers.common import apply_rotary, rotary_tables
from ovq.ops import OVQState
from ovq.ops.parts import StateSpec
from ovq.ops.serialization import upgraded
from ovq.ops.state import state_tensors, tensors_of


def num_bytes(spec: StateSpec) -> int:
    """Bytes of the tensors of a specification.

    Example:
        >>> num_bytes({"count": ((2, 3), torch.int64), "keys": ((5,), torch.bfloat16)})
        58
    """
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.values())


def check_num_seen(where: str, tensors: Mapping[str, Tensor], num_tokens: int) -> None:
    """Raise ValueError, naming `where`, unless `num_seen` of the state's single row is `num_tokens`."""
    if (found := tensors["num_seen"].tolist()) != [num_tokens]:
        raise ValueError(f"{where}: expected num_seen [{num_tokens}], found {found}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(ABC):
    """Operations on states of one kind. States are values: operations return new states.

    Attributes:
        kind: description of such a state. A mixer continues only from a state of its own kind.
        rope_theta: base of the rotary frequencies of its keys; None without rotary embedding.
    """

    kind: str
    rope_theta: float | None = dataclasses.field(default=None, compare=False)

    @abstractmethod
    def tensors(self, state: Any) -> dict[str, Tensor]:
        """Tensors of a state by name, rows first, on their device and with their autograd graph."""

    def saved(self, state: Any) -> dict[str, Tensor]:
        """The same tensors as written to a file: detached, contiguous, on the CPU."""
        return {name: t.detach().cpu().contiguous() for name, t in self.tensors(state).items()}

    @abstractmethod
    def restored(self, tensors: Mapping[str, Tensor], device: torch.device | str | None) -> Any:
        """The state from the result of `tensors` or `saved`, on `device` (None: the tensors' device)."""

    # For states with methods of these names.
    def select(self, state: Any, rows: Tensor) -> Any:
        """The given rows `[R]` in the given order, repeats allowed; shares no memory with `state`."""
        return state.select(rows)

    def to(self, state: Any, device: torch.device | str) -> Any:
        """The state on another device."""
        return state.to(device, non_blocking=True)

    def detach(self, state: Any) -> Any:
        """The state detached from the autograd graph."""
        return state.detach()

    @abstractmethod
    def concatenate(self, states: Sequence[Any], num_missing: Sequence[int]) -> Any:
        """All rows of several states in one; the rows of state i are shifted by `num_missing[i]` columns."""

    def num_by_column(self, state: Any) -> int:
        """Number of last columns that the state stores individually, padding included; 0 if it needs no mask.

        Most states store the tokens of a row by their place in the row, without padding.
        """
        return 0

    @abstractmethod
    def without_columns(self, state: Any, num_dropped: int, num_left: int) -> Any:
        """The state as if its first `num_dropped` columns had never been read; `num_left` columns remain."""

    def _rotated(self, keys: Tensor, num_columns: int) -> Tensor:
        """Keys `[..., K]`, or sums of keys, rotated to positions `num_columns` higher (or lower)."""
        if self.rope_theta is None or num_columns == 0:
            return keys
        # Rotations by p and then m compose to p + m, and are linear, so sums of keys can be rotated, too.
        wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
        position = torch.tensor([num_columns], device=keys.device)
        tables = rotary_tables(position, keys.shape[-1], theta=self.rope_theta, like=wide)
        return apply_rotary(wide, *tables).to(keys.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorMemory(Memory):
    """States that are a `dict` of tensors by name.

    `"keys"` are rotated when their row is shifted. States may differ in length in the third dimension.

    Attributes:
        is_by_column: whether the third dimension is the last columns of the call, padding included.

    Example:
        >>> memory = TensorMemory(kind="all keys and values")
        >>> long, short = ({"keys": torch.ones(1, 2, length, 4)} for length in (5, 3))
        >>> memory.concatenate([long, short], [0, 2])["keys"].shape
        torch.Size([2, 2, 5, 4])
    """

    is_by_column: bool = False

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Memory.tensors`."""
        return dict(state)

    def num_by_column(self, state: dict[str, Tensor]) -> int:
        """See `Memory.num_by_column`."""
        return state["keys"].shape[2] if self.is_by_column else 0

    def without_columns(self, state: dict[str, Tensor], num_dropped: int, num_left: int) -> dict[str, Tensor]:
        """See `Memory.without_columns`."""
        kept = state
        if self.is_by_column and state["keys"].shape[2] > num_left:
            # Copies, as views would keep the dropped columns in memory.
            kept = {name: t[:, :, t.shape[2] - num_left :].clone() for name, t in state.items()}
        return {name: self._rotated(t, -num_dropped) if name == "keys" else t for name, t in kept.items()}

    def restored(self, tensors: Mapping[str, Tensor], device: torch.device | str | None) -> dict[str, Tensor]:
        """See `Memory.restored`."""
        return {name: t.to(device) for name, t in tensors.items()}

    def select(self, state: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """See `Memory.select`."""
        return {name: t[rows.to(t.device)] for name, t in state.items()}

    def to(self, state: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
        """See `Memory.to`."""
        return {name: t.to(device, non_blocking=True) for name, t in state.items()}

    def detach(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Memory.detach`."""
        return {name: t.detach() for name, t in state.items()}

    def concatenate(
        self, states: Sequence[dict[str, Tensor]], num_missing: Sequence[int]
    ) -> dict[str, Tensor]:
        """See `Memory.concatenate`; shorter states are padded with zeros at the beginning."""
        joined = {}
        for name in states[0]:
            parts = [state[name] for state in states]
            if name == "keys":
                parts = [self._rotated(t, n) for t, n in zip(parts, num_missing, strict=True)]
            if len({t.shape[1:] for t in parts}) > 1:
                longest = max(t.shape[2] for t in parts)
                parts = [F.pad(t, (0, 0, longest - t.shape[2], 0)) for t in parts]
            joined[name] = torch.cat(parts)
        return joined


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotMemory(Memory):
    """States of class `OVQState`, of at most `num_slots` slots and of chunks of `chunk_size` tokens."""

    kind: str = "an OVQState"
    num_slots: int = dataclasses.field(compare=False)
    chunk_size: int = dataclasses.field(compare=False)

    def tensors(self, state: OVQState) -> dict[str, Tensor]:
        """See `Memory.tensors`."""
        return tensors_of(state)

    def saved(self, state: OVQState) -> dict[str, Tensor]:
        """See `Memory.saved`; clears pending tokens of other continuations from shared buffers."""
        return state_tensors(state)

    def restored(self, tensors: Mapping[str, Tensor], device: torch.device | str | None) -> OVQState:
        """See `Memory.restored`."""
        # `num_seen` is always on the CPU.
        parts: dict[str, Any] = {
            name: tensor.to("cpu" if name == "num_seen" else device)
            for name, tensor in upgraded(dict(tensors)).items()
        }
        return OVQState(**parts, num_slots=self.num_slots, chunk_size=self.chunk_size)

    def concatenate(self, states: Sequence[OVQState], num_missing: Sequence[int]) -> OVQState:
        """See `Memory.concatenate`."""
        return OVQState.concatenate(
            [self._shifted(state, missing) for state, missing in zip(states, num_missing, strict=True)]
        )

    def without_columns(self, state: OVQState, num_dropped: int, num_left: int) -> OVQState:
        """See `Memory.without_columns`."""
        return self._shifted(state, -num_dropped)

    def _shifted(self, state: OVQState, num_columns: int) -> OVQState:
        if self.rope_theta is None:
            return state
        wide = state.to_state_dtype("float32")
        shifted = dataclasses.replace(
            wide,
            key_sum=self._rotated(wide.key_sum, num_columns),
            pending_keys=self._rotated(wide.pending_keys, num_columns),
        )
        return shifted.to_state_dtype(state.state_dtype)
