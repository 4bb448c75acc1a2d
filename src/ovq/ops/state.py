"""`OVQState`: the constant-size memory of all tokens seen so far.

A state is a value: no operation modifies its input state, so keeping a reference keeps a snapshot.
`serialization.py` saves and loads states.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.ops.narrow import STEPS, check_state_dtype, narrowed, state_dtype_of, widened
from ovq.ops.nearest import shrunk
from ovq.ops.options import VALUE_WEIGHT, check_sizes
from ovq.ops.parts import of_rows, slot_spec
from ovq.ops.pending import PendingBuffers
from ovq.ops.rows import checked_device, checked_rows
from ovq.ops.schedule import tokens_merged
from ovq.ops.serialization import load_state, save_state
from ovq.ops.summary import StateSummary
from ovq.ops.sums import DTYPES, slot_means, state_dtype

SLOT_TENSORS = ("key_sum", "value_sum", "count", "weight", "key_step", "value_step")
PENDING_TENSORS = ("pending_keys", "pending_values", "pending_weights")
# Only in heads of converted models.
HEAD_TENSORS = ("position_sum", "key_unit", "sink_keys", "token_use")
_ROW_TENSORS = (*SLOT_TENSORS, *PENDING_TENSORS, "pending_forget", *HEAD_TENSORS)
_SIZES = ("num_slots", "chunk_size", "num_sinks", "window")
# The slots, and the pending tokens, of a state.
slots_in, pending_in = operator.attrgetter(*SLOT_TENSORS), operator.attrgetter(*PENDING_TENSORS)


@dataclasses.dataclass(eq=False, repr=False)
class OVQState:
    """The dictionary of every row and key/value head, and the pending tokens, which are still exact.

    In a state of `ovq_attention` these are the tokens of the incomplete last chunk. Heads of converted models
    (`ovq.convert`) also keep the first tokens, their *sinks*, and a longer window of last tokens exactly.

    Attributes:
        key_sum: `[B, Hkv, M, K]` sums of the keys assigned to each slot, float32 (float64 for float64
            inputs), or in the format `state_dtype`; narrow formats hold means where `pending_forget` is given
            (`narrow.py`).
        value_sum: `[B, Hkv, M, V]` sums of the values, same dtype.
        count: `[B, Hkv, M]` number of tokens assigned to each slot, int64 to stay exact at any length.
            Spare slots have count 0 and sums 0.
        pending_keys: `[B, Hkv, P, K]` keys of the pending tokens, in the dtype of the inputs. P is C; with a
            window S + W, sinks first. Row b uses its first `num_pending[b]` places; others are undefined.
        pending_values: `[B, Hkv, P, V]` values of the pending tokens, likewise.
        num_seen: `[B]` tokens seen by each row, int64, always on the CPU: the schedule is host control flow.
        num_slots: N, the maximum number of slots per head.
        chunk_size: C, tokens per chunk.
        weight: `[B, Hkv, M]` total weight of the tokens in each slot, in the dtype of the sums; None without
            token weights (`token_weights` of `ovq_attention`), where the count takes its place.
        pending_weights: `[B, Hkv, C]` weights of the pending tokens, likewise.
        pending_forget: `[B, Hkv]` float64 sum of `log_forget` over the pending tokens; None without
            forgetting. With it, `weight` is relative to the start of the incomplete chunk, and the weight of
            a pending token is divided by the forget factors of the chunk up to it (math.md, (29)).
        key_step: `[B, Hkv, M]` bfloat16 scales of `key_sum` in int8; None in other formats. value_step:
            likewise.
        num_sinks: S, the number of first tokens that are never merged.
        window: W, the number of tokens after the sinks of which the oldest C are merged; None for C.

    Only in heads of converted models, None in others:
        position_sum: `[B, Hkv, M]` int64 sum of the positions of the tokens in each slot. Slots that were
            re-positioned (`ovq.convert`) have lower counts, and the positions that they were moved to.
        key_unit: `[B, Hkv]` root-mean-square length of keys, as a power of 2; `key_sum` is in this unit. 0
            until the first merge of keys that are not as good as zero.
        sink_keys: `[B, Hkv, S, K]` original keys of the sinks once `pending_keys` are re-positioned, else 0.
        token_use: `[B, Hkv, K + V + 1]` float32 coefficients of token weights in merges (`convert/use.py`);
            None for weights of 1.

    Example:
        >>> import torch
        >>> from ovq.ops import ovq_attention
        >>> k = torch.nn.functional.normalize(torch.randn(2, 40, 1, 8), dim=-1)
        >>> _, state = ovq_attention(k, k, k, num_slots=8, chunk_size=16, output_final_state=True)
        >>> state.num_seen.tolist(), state.num_pending.tolist(), state.count.sum(-1).flatten().tolist()
        ([40, 40], [8, 8], [32, 32])
        >>> state.keys.shape
        torch.Size([2, 1, 6, 8])
        >>> state
        OVQState(rows=2, heads=1, num_seen=40, slots=6 of 8, chunk_size=16, torch.float32 on cpu, 2,928 bytes)
    """

    key_sum: Tensor
    value_sum: Tensor
    count: Tensor
    pending_keys: Tensor
    pending_values: Tensor
    num_seen: Tensor
    num_slots: int
    chunk_size: int
    weight: Tensor | None = None
    pending_weights: Tensor | None = None
    pending_forget: Tensor | None = None
    key_step: Tensor | None = None
    value_step: Tensor | None = None
    num_sinks: int = 0
    window: int | None = None
    position_sum: Tensor | None = None
    key_unit: Tensor | None = None
    sink_keys: Tensor | None = None
    token_use: Tensor | None = None
    # Buffers that decode steps write pending tokens to, if this state comes from decoding (`advanced`).
    _buffers: PendingBuffers | None = dataclasses.field(default=None, repr=False)
    # The decode step that made this state, if it can be run again (`PreparedStep` in `backends/cpu`).
    _step: Any = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        # `dataclasses.replace` also copies the buffers of the earlier state; a state with other pending
        # tensors must not keep them alive.
        if self._buffers is not None and not self._buffers.are(pending_in(self)):
            self._buffers = None

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: copies of what kernels write to in place, as memory is shared."""
        return vars(self if self.window is None else self.clone())

    def __repr__(self) -> str:
        """Sizes, dtype and device of the state; `summary` describes its contents."""
        # Tokens seen: one number if equal in all rows, else the range.
        seen = sorted({*self.num_seen.tolist()})
        tokens = f"{seen[0]}..{seen[-1]}" if len(seen) > 1 else "".join(map(str, seen)) or "none"
        rows, heads, slots = self.count.shape
        exact = "" if self.window is None else f"sinks={self.num_sinks}, window={self.window}, "
        return (
            f"OVQState(rows={rows}, heads={heads}, num_seen={tokens}, slots={slots} of {self.num_slots}, "
            f"{exact}chunk_size={self.chunk_size}, {self.pending_keys.dtype} on {self.count.device}, "
            f"{'' if self.state_dtype == 'float32' else f'slots in {self.state_dtype}, '}"
            f"{self.nbytes:,} bytes)"
        )

    def summary(self) -> StateSummary:
        """Summary statistics: tokens, slots, bytes, and the distribution of tokens over slots.

        Example:
            >>> sizes = {"num_kv_heads": 2, "key_dim": 4, "value_dim": 4, "num_slots": 8, "chunk_size": 4}
            >>> OVQState.empty(batch_size=1, **sizes).summary().num_open
            (0,)
        """
        return StateSummary.of(self)

    @classmethod
    def empty(
        cls,
        *,
        batch_size: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int,
        num_slots: int,
        chunk_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> OVQState:
        """The state of rows that have seen no token; `dtype` is the dtype of the inputs.

        Raises:
            ValueError: if a size is out of range, or no call can have inputs of `dtype`.

        Example:
            >>> OVQState.empty(
            ...     batch_size=1, num_kv_heads=2, key_dim=4, value_dim=4, num_slots=8, chunk_size=4
            ... ).nbytes
            264
        """
        check_sizes(0, batch_size=batch_size)
        check_sizes(1, num_kv_heads=num_kv_heads, key_dim=key_dim, value_dim=value_dim)
        check_sizes(1, num_slots=num_slots, chunk_size=chunk_size)
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, found {dtype!r}")
        spec = slot_spec(
            0,
            num_kv_heads=num_kv_heads,
            head_dim=key_dim,
            value_dim=value_dim,
            chunk_size=chunk_size,
            dtype=dtype,
        )
        tensors: dict[str, Any] = {
            name: torch.zeros(shape, dtype=kind, device="cpu" if name == "num_seen" else device)
            for name, (shape, kind) in of_rows(spec, batch_size).items()
        }
        return cls(**tensors, num_slots=num_slots, chunk_size=chunk_size)

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return self.count.shape[0]

    @property
    def num_merged(self) -> Tensor:
        """`[B]` number of tokens of each row that were merged into the slots (dropped if it has none)."""
        return tokens_merged(
            self.num_seen, chunk_size=self.chunk_size, num_sinks=self.num_sinks, window=self.window
        )

    @property
    def num_pending(self) -> Tensor:
        """`[B]` number of tokens of each row that were not merged; sinks never are."""
        return self.num_seen % self.chunk_size if self.window is None else self.num_seen - self.num_merged

    @property
    def mass(self) -> Tensor:
        """`[B, Hkv, M]` mass of each slot in the softmax: total weight, or count without token weights."""
        return self.count if self.weight is None else self.weight

    @property
    def num_open(self) -> Tensor:
        """`[B]` number of slots in use (count of at least 1) in each row; without slots no device is read."""
        return (self.count[:, 0] > 0).sum(-1).cpu() if self.count.numel() else torch.zeros_like(self.num_seen)

    @property
    def keys(self) -> Tensor:
        """`[B, Hkv, M, K]` mean key of each slot, zero for spare slots."""
        means = slot_means(self.wide_sums("key_sum"), self.mass)
        return means if self.key_unit is None else means * self.key_unit[..., None, None]

    @property
    def values(self) -> Tensor:
        """`[B, Hkv, M, V]` mean value of each slot, zero for spare slots."""
        return slot_means(self.wide_sums("value_sum"), self.mass)

    @property
    def state_dtype(self) -> str:
        """Format of the sums: `"float32"` (float64 sums included), `"bfloat16"` or `"int8"`."""
        return state_dtype_of(self.key_sum.dtype)

    @property
    def wide(self) -> torch.dtype:
        """Dtype in which backends merge: float32, or float64 for float64 inputs."""
        return state_dtype(self.pending_keys.dtype)

    @property
    def _mean_weight(self) -> Tensor | None:
        """The weights of the slots if narrow formats hold means, else None."""
        return None if self.pending_forget is None else self.weight

    def wide_sums(self, name: str) -> Tensor:
        """`key_sum` or `value_sum`, by `name`, in the dtype `wide`."""
        return widened(getattr(self, name), getattr(self, STEPS[name]), self.wide, self._mean_weight)

    def to_state_dtype(self, state_dtype: str) -> OVQState:
        """The state with its sums in another format; calls that continue it keep the format.

        Sums in `"bfloat16"` take half the bytes of float32, those in `"int8"`, with a scale per slot, a
        quarter. They are rounded whenever a chunk is merged into them, and there are no gradients.

        Raises:
            ValueError: if the format is unknown, or the state has gradients, which take float32.

        Example:
            >>> import torch
            >>> from ovq.ops import ovq_attention
            >>> k = torch.nn.functional.normalize(torch.randn(1, 64, 1, 8), dim=-1)
            >>> options = {"num_slots": 32, "chunk_size": 16, "output_final_state": True}
            >>> _, state = ovq_attention(k, k, k, **options)
            >>> _, state = ovq_attention(k, k, k, **options, initial_state=state.to_state_dtype("int8"))
            >>> state
            OVQState(rows=1, heads=1, ..., torch.float32 on cpu, slots in int8, 1,... bytes)
        """
        if state_dtype == self.state_dtype:
            return self
        check_state_dtype(state_dtype)
        if torch.is_grad_enabled() and (self.key_sum.requires_grad or self.value_sum.requires_grad):
            raise ValueError(f"gradients: expected sums in float32 (state_dtype), found {state_dtype}")
        changed: dict[str, Any] = {}
        for name, step in STEPS.items():
            changed[name], changed[step] = narrowed(self.wide_sums(name), state_dtype, self._mean_weight)
        return dataclasses.replace(self, **changed)

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors of the state."""
        return sum(t.nbytes for t in tensors_of(self).values())

    @property
    def _names(self) -> list[str]:
        """Names of the per-row tensors that are not None (without `num_seen`)."""
        return [name for name in _ROW_TENSORS if getattr(self, name) is not None]

    def _map(self, function: Callable[[Tensor], Tensor]) -> OVQState:
        changed: dict[str, Any] = {name: function(getattr(self, name)) for name in self._names}
        return dataclasses.replace(self, **changed)

    def clone(self) -> OVQState:
        """A copy that shares no memory with this state."""
        return dataclasses.replace(self._map(Tensor.clone), num_seen=self.num_seen.clone())

    def detach(self) -> OVQState:
        """The state detached from the autograd graph, for truncated backpropagation."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str | None = None, *, non_blocking: bool = False) -> OVQState:
        """The state on another device; `num_seen` stays on the CPU, and dtypes do not change.

        Raises:
            ValueError: if `device` is not a device, for example a dtype.
        """
        if device is not None:
            device = checked_device(device)
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def select(self, rows: Tensor | Sequence[int]) -> OVQState:
        """The given rows in the given order, repeats allowed (integer indices, or a boolean mask)."""
        host = checked_rows(rows, self.batch_size)
        picked: dict[str, Any] = {
            name: (t := getattr(self, name)).index_select(0, host.to(t.device)) for name in self._names
        }
        selected = dataclasses.replace(self, **picked, num_seen=self.num_seen[host])
        if self.window is None:
            # Indexing has already copied, so decoding with beam search, which selects rows at every step,
            # need not copy again.
            selected._buffers = PendingBuffers(pending_in(selected), selected.num_pending.tolist())
        return selected

    def reorder(self, index: Tensor) -> OVQState:
        """Rows gathered by `index` `[B]`, as a beam search does between steps."""
        return self.select(index)

    def repeat_interleave(self, n: int) -> OVQState:
        """Each row repeated `n` times consecutively, to sample several continuations of one context.

        Raises:
            ValueError: if `n` is not an integer of at least 1.
        """
        check_sizes(1, n=n)
        return self.select(torch.arange(self.batch_size, device="cpu").repeat_interleave(n))

    @staticmethod
    def concatenate(states: Sequence[OVQState]) -> OVQState:
        """All rows of several states in one state, for example when rows join a running batch.

        The states may differ only in the number of rows and of allocated slots.
        """
        states = list(states)
        if not states:
            raise ValueError("states: expected at least one state, found none")
        for state in states:
            if not isinstance(state, OVQState):
                raise ValueError(f"states: expected each to be an OVQState, found {type(state).__name__}")
        if states[0].window is None and any(state.weight is not None for state in states):
            states = [weighted(state) for state in states]
        if any(state.pending_forget is not None for state in states):
            states = [forgetting(state) for state in states]
        first = states[0]
        for other in states[1:]:
            for what in (*_SIZES, "state_dtype", "_names"):
                if getattr(other, what) != getattr(first, what):
                    raise ValueError(
                        f"states: expected {what.strip('_')} {getattr(first, what)} in all, "
                        f"found {getattr(other, what)}"
                    )
            for name in first._names:
                a, b = getattr(first, name), getattr(other, name)
                same_dims = a.shape[1] == b.shape[1] and a.shape[3:] == b.shape[3:]
                if not same_dims or (a.dtype, a.device) != (b.dtype, b.device):
                    raise ValueError(
                        f"states: {name}: expected {a.dtype} {tuple(a.shape[1:])} on {a.device} in all, "
                        f"found {b.dtype} {tuple(b.shape[1:])} on {b.device}"
                    )
        capacity = max(s.count.shape[2] for s in states)
        grown = [with_capacity(s, capacity) for s in states]
        joined: dict[str, Any] = {name: torch.cat([getattr(s, name) for s in grown]) for name in first._names}
        num_seen = torch.cat([s.num_seen for s in states])
        return dataclasses.replace(first, **joined, num_seen=num_seen)

    def resize(self, num_slots: int, *, value_weight: float = VALUE_WEIGHT) -> OVQState:
        """The state with a new maximum number of slots N: an elastic dictionary.

        Growing only raises the maximum; the schedule then opens slots as chunks complete. Shrinking merges
        nearest slots, by `merge="nearest"` whatever the update rule, an eighth of the slots at a time, until
        `num_slots` per head are left. Merged slots stay in the order of their lowest members, and counts
        still add up to the number of merged tokens.

        Args:
            num_slots: the new maximum, N.
            value_weight: weight of values relative to keys in distances, as in `ovq_attention`.

        Raises:
            ValueError: if `num_slots` is not an integer of at least 1, or `value_weight` is not a finite
                number of at least 0.

        Example:
            >>> import torch
            >>> from ovq.ops import ovq_attention
            >>> k = torch.nn.functional.normalize(torch.randn(1, 64, 1, 8), dim=-1)
            >>> options = {"num_slots": 32, "chunk_size": 16, "merge": "nearest"}
            >>> _, state = ovq_attention(k, k, k, **options, output_final_state=True)
            >>> state.resize(8)
            OVQState(rows=1, heads=1, num_seen=64, slots=8 of 8, chunk_size=16, torch.float32 on cpu, ...)
        """
        wide = self.to_state_dtype("float32")
        kept: dict[str, Any] = shrunk(slots_of(wide), num_slots, value_weight=value_weight)
        return dataclasses.replace(wide, **kept, num_slots=num_slots).to_state_dtype(self.state_dtype)

    def save(self, path: str | os.PathLike) -> None:
        """Write the state to a safetensors file, atomically: if writing fails, an existing file is unchanged.

        Raises:
            OSError: if the file cannot be written.
        """
        save_state(path, state_tensors(self), {name: getattr(self, name) for name in _SIZES})

    @staticmethod
    def load(path: str | os.PathLike, *, device: torch.device | str = "cpu") -> OVQState:
        """Read a state written by `save`.

        Raises:
            ValueError: if the file is not a saved state, is damaged, or holds values invalid for a state, or
                `device` is not a device.
        """
        return OVQState(**load_state(path, device=checked_device(device)))


def slots_of(state: OVQState) -> dict[str, Tensor]:
    """The tensors of the slots of a state that are not None, by name."""
    names = (*SLOT_TENSORS, "position_sum")
    return {name: x for name in names if (x := getattr(state, name)) is not None}


def tensors_of(state: OVQState) -> dict[str, Tensor]:
    """All tensors of a state that are not None, by name."""
    return {name: getattr(state, name) for name in (*state._names, "num_seen")}


def state_tensors(state: OVQState) -> dict[str, Tensor]:
    """The tensors of a state as they are saved: detached, contiguous, on the CPU, unused positions zero."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors_of(state).items()}
    # Positions beyond num_pending may hold tokens of another continuation, which must not reach the file.
    used = torch.arange(tensors["pending_keys"].shape[2], device="cpu") < state.num_pending[:, None, None]
    for name, x in tensors.items():
        if name.startswith("pending") and x.dim() > 2:
            tensors[name] = x.masked_fill(~(used if x.dim() == 3 else used[..., None]), 0)
    return tensors


def weighted(state: OVQState) -> OVQState:
    """`state` with token weights; tokens seen without a weight get weight 1."""
    if state.weight is not None:
        return state
    ones = torch.ones(state.pending_keys.shape[:3], dtype=state.wide, device=state.count.device)
    return dataclasses.replace(state, weight=state.count.to(state.wide), pending_weights=ones)


def forgetting(state: OVQState) -> OVQState:
    """`state` with `pending_forget`, zero at first, and weights, so that calls can forget from here on."""
    state = weighted(state)
    if state.pending_forget is not None:
        return state
    zeros = torch.zeros(state.count.shape[:2], dtype=torch.float64, device=state.count.device)
    # Narrow sums become means.
    wide = state.to_state_dtype("float32")
    return dataclasses.replace(wide, pending_forget=zeros).to_state_dtype(state.state_dtype)


def with_capacity(state: OVQState, capacity: int) -> OVQState:
    """`state` with at least `capacity` slots allocated; added slots are spare (all zero)."""
    missing = capacity - state.count.shape[2]
    if missing <= 0:
        return state
    padded: dict[str, Any] = {
        name: torch.nn.functional.pad(x, (0, 0) * (x.dim() - 3) + (0, missing))
        for name, x in slots_of(state).items()
    }
    return dataclasses.replace(state, **padded)


def advanced(state: OVQState) -> OVQState:
    """The state after one more token per row, whose keys and values the caller has yet to write.

    The caller writes the token of row r to position `state.num_pending[r]` of the result's pending buffers.
    They are contiguous, and only the result and states derived from it read that position.
    """
    buffers, own = state._buffers, pending_in(state)
    # `num_pending` as Python numbers, and read anew: a caller may have changed `num_seen` in place.
    places = [n % state.chunk_size for n in state.num_seen.tolist()]
    if buffers is not None and buffers.take(own, places):
        # Equivalent to `dataclasses.replace` below, in a fraction of the time.
        after = object.__new__(OVQState)
        after.__dict__.update(state.__dict__, num_seen=state.num_seen + 1, _step=None)
        return after
    buffers = PendingBuffers.copied(own, [p + 1 for p in places])
    pending: dict[str, Any] = dict(zip(PENDING_TENSORS, buffers.tensors, strict=True))
    return dataclasses.replace(state, **pending, num_seen=state.num_seen + 1, _buffers=buffers)
