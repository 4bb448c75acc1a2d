"""`slot_assignments`: the slot of every token of a call, to inspect the memory.

It merges the tokens as `ovq_attention` does, by the same code, but computes no attention. `"nearest"` merges
slots with slots, so a token may change its slot after its own chunk. Backends therefore report assignments
chunk by chunk (`backends/learned.py`), which are traced to the end of the call here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.ops.ablation import Ablation, with_earlier_names
from ovq.ops.backends import LEARNING, chosen_to_learn, learn
from ovq.ops.backends.chunks import Chunks
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.learned import Learned, Merging
from ovq.ops.backends.plan import Plan
from ovq.ops.call import Call, RowBounds
from ovq.ops.checks import check_kv, checked_call, checked_scale
from ovq.ops.options import VALUE_WEIGHT, check_sizes, options_of
from ovq.ops.random_init import seed_of
from ovq.ops.state import OVQState
from ovq.ops.uncompiled import uncompiled


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SlotAssignments:
    """The slots of the tokens of a call.

    Per-token tensors have the layout of the call, with -1 at padding and (in slots) at pending tokens. R is
    the number of rows: B, or the number of rows packed into a batch of 1. The *position* of a token is the
    number of tokens before it in its row, earlier calls included.

    Attributes:
        slots: `[B, Hkv, T]` int64 slot of each token at the end of the call.
        chunk_slots: `[B, Hkv, T]` slot of each token right after its own chunk. It differs from `slots` only
            where a rule that merges pairs has merged that slot into another.
        earlier_slots: `[R, Hkv, M]` final slot of each slot of the initial state, -1 for spare ones.
        earlier_pending: `[R, Hkv, C]` final slot of each token that was pending in the initial state.
        position: `[B, T]` position of each token. row: `[B, T]` row of each token.
        state: the state after the call, as `ovq_attention` returns it; its `count` includes the tokens of
            earlier calls.

    Example:
        >>> keys = torch.eye(4)[[0, 1, 0, 1, 2, 2, 0, 3, 3]][None, :, None]
        >>> found = slot_assignments(keys, keys, num_slots=4, chunk_size=4, growth="immediate")
        >>> found.slots.tolist(), found.state.count.tolist()
        ([[[0, 1, 2, 3, 0, 0, 0, 0, -1]]], [[[5, 1, 1, 1]]])
        >>> found = slot_assignments(keys, keys, num_slots=4, chunk_size=4, merge="nearest")
        >>> found.slots.tolist(), found.state.count.tolist()
        ([[[0, 1, 0, 1, 2, 2, 0, 3, -1]]], [[[3, 2, 2, 1]]])
        >>> found.chunk_slots.tolist()
        [[[0, 1, 2, 3, 2, 2, 0, 3, -1]]]
        >>> found.members(0).tolist(), found.oldest.tolist(), found.mean_position.tolist()
        ([0, 2, 6], [[[0, 1, 4, 7]]], [[[2.6666666666666665, 2.0, 4.5, 7.0]]])
    """

    slots: Tensor
    chunk_slots: Tensor
    earlier_slots: Tensor
    earlier_pending: Tensor
    position: Tensor
    row: Tensor
    state: OVQState
    _history: _History = dataclasses.field(repr=False)

    def after(self, num_tokens: int) -> Tensor:
        """Slots `[B, Hkv, T]` of the tokens after the first `num_tokens` tokens of each row.

        Tokens not merged by then have -1. A query at that position reads these slots.

        Raises:
            ValueError: if `num_tokens` is not an integer of at least 0.

        Example:
            >>> x = torch.eye(4)[[0, 0, 1, 1]][None, :, None]
            >>> found = slot_assignments(x, x, num_slots=4, chunk_size=2, merge="nearest")
            >>> found.after(3).tolist()
            [[[0, 1, -1, -1]]]
        """
        check_sizes(0, num_tokens=num_tokens)
        return self._history.slots(num_tokens)

    def members(self, slot: int, *, head: int = 0, row: int = 0) -> Tensor:
        """Positions of the tokens of this call that end in a slot, ascending.

        Raises:
            ValueError: if `slot`, `head` or `row` is out of range.
        """
        num_rows, num_heads, _ = self.state.count.shape
        most = {"slot": self.state.num_slots, "head": num_heads, "row": num_rows}
        for (name, num), found in zip(most.items(), (slot, head, row), strict=True):
            if found not in range(num):
                raise ValueError(f"{name}: expected 0 to {num - 1}, found {found!r}")
        is_member = (self.slots[:, head] == slot) & (self.row == row)
        return self.position[is_member]

    @property
    def oldest(self) -> Tensor:
        """`[R, Hkv, M]` lowest position of a token of this call in each slot; -1 if there is none."""
        index, position = self._flat()
        longest = torch.iinfo(torch.int64).max
        lowest = index.new_full((self.state.count.numel(),), longest)
        lowest = lowest.scatter_reduce(0, index, position, "amin")
        return lowest.masked_fill(lowest == longest, -1).view(self.state.count.shape)

    @property
    def mean_position(self) -> Tensor:
        """`[R, Hkv, M]` float64 mean position of the tokens of this call in each slot; NaN if none."""
        index, position = self._flat()
        zeros = torch.zeros(self.state.count.numel(), dtype=torch.float64, device=index.device)
        total = zeros.index_add(0, index, position.double())
        number = zeros.index_add(0, index, torch.ones_like(total[:1]).expand(len(index)))
        return (total / number).view(self.state.count.shape)

    def _flat(self) -> tuple[Tensor, Tensor]:
        """For each merged (token, head): its slot as an index into `[R * Hkv * M]`, and its position."""
        _, num_heads, capacity = self.state.count.shape
        b, h, t = (self.slots >= 0).nonzero(as_tuple=True)
        stream = self.row[b, t] * num_heads + h
        return stream * capacity + self.slots[b, h, t], self.position[b, t]


def slot_assignments(
    k: Tensor,
    v: Tensor,
    *,
    num_slots: int,
    chunk_size: int,
    initial_state: OVQState | None = None,
    attention_mask: Tensor | RowBounds | None = None,
    cu_seqlens: Tensor | None = None,
    growth: str | None = None,
    init: str = "novelty",
    merge: str = "existing",
    value_weight: float = VALUE_WEIGHT,
    token_weights: Tensor | None = None,
    log_forget: Tensor | None = None,
    generator: torch.Generator | None = None,
    ablation: Ablation | Mapping[str, Any] | None = None,
    backend: str = "auto",
    **earlier_names: Any,
) -> SlotAssignments:
    """Slots of the tokens of a call of `ovq_attention`, for every row and key/value head.

    Pass the keys, values and options of that call; queries have no influence. There are no gradients.

    Args:
        k: `[B, T, Hkv, K]` keys. v: `[B, T, Hkv, V]` values.
        num_slots, chunk_size, growth, init, merge, value_weight, generator: as in `ovq_attention`.
        token_weights, log_forget, ablation, earlier_names: as in `ovq_attention`.
        initial_state: the state to continue from. It is not changed.
        attention_mask, cu_seqlens: as in `ovq_attention`.
        backend: `"torch"`, `"cpu"` (compiled for this processor), `"triton"` (not with `log_forget`) or
            `"auto"`, the fastest that can. The assignments of all backends of `ovq_attention` are equal.

    Raises:
        ValueError: if an argument is invalid; the message says what was expected and what was found.

    Example:
        >>> k, v = torch.randn(2, 1, 40, 2, 8).unbind()
        >>> found = slot_assignments(k, v, num_slots=16, chunk_size=8)
        >>> found.slots.shape, int(found.slots.max()), found.state.count.sum(-1).tolist()
        (torch.Size([1, 2, 40]), 10, [[40, 40]])
    """
    check_kv(k, v)
    options = options_of(
        num_slots=num_slots,
        chunk_size=chunk_size,
        growth=growth,
        init=init,
        merge=merge,
        ablation=with_earlier_names(ablation, earlier_names, slot_assignments),
        value_weight=value_weight,
        seed=seed_of(init, generator),
    )
    if backend not in ("auto", *LEARNING):
        raise ValueError(f"backend: expected one of {('auto', *LEARNING)}, found {backend!r}")
    given: dict[str, Any] = {
        "initial_state": initial_state,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "token_weights": token_weights,
        "log_forget": log_forget,
    }
    # Keys replace the queries, of which only the shape matters.
    return _slot_assignments({"q": k, "k": k, "v": v, "options": options, **given}, backend)


@uncompiled
@torch.no_grad()
def _slot_assignments(given: dict[str, Any], backend: str) -> SlotAssignments:
    """`slot_assignments` for the arguments of `checked_call`."""
    k = given["k"]
    call = checked_call(**given, scale=checked_scale(None, k), wants_state=True)
    # First, so that options that no backend supports are refused before the layout is made.
    backend = chosen_to_learn(backend, k, call.v, call.options, call.gates, call.tensors)
    # Backends merge in the wide dtype, and round.
    chunks = Chunks(dataclasses.replace(call, state=call.state.to_state_dtype("float32")))
    before, plan = chunks.before, chunks.plan
    sums = Dictionary.of(before).clone()
    merging = Merging(chunks.k, chunks.v, sums, plan, chunks.weights, chunks.fading)
    learned = learn(merging, backend)
    history = _History(learned, plan, k.shape[0], k.shape[1], before.count.shape[2])
    final, origin, pending = history.carried(None)
    inverse = plan.aligned.inverse()
    row, position = _places(call)
    return SlotAssignments(
        slots=history.of_tokens(final),
        chunk_slots=history.of_tokens(history.of_chunks()),
        earlier_slots=origin.masked_fill(before.count == 0, -1)[inverse, :, : call.state.count.shape[2]],
        earlier_pending=pending[inverse],
        position=position,
        row=row,
        state=chunks.state_after(sums).to_state_dtype(call.options.state_dtype),
        _history=history,
    )


def _places(call: Call) -> tuple[Tensor, Tensor]:
    """Row and position `[B, T]` of each token, -1 at padding."""
    row = torch.full((call.num_tokens,), -1, device="cpu")
    position = row.clone()
    bounds = zip(call.rows.starts, call.rows.lengths, call.state.num_seen.tolist(), strict=True)
    for r, (start, length, seen) in enumerate(bounds):
        row[start : start + length] = r
        position[start : start + length] = torch.arange(seen, seen + length, device="cpu")
    shape, device = call.k.shape[:2], call.k.device
    return row.view(shape).to(device), position.view(shape).to(device)


class _History:
    """The moves of a call chunk by chunk, from which the slot of each token at any time follows.

    Args:
        learned: the report of the backend.
        plan: the plan of the call.
        batch: B. length: T.
        capacity: M, number of allocated slots.
    """

    def __init__(self, learned: Learned, plan: Plan, batch: int, length: int, capacity: int) -> None:
        self._learned, self._plan = learned, plan
        self._batch, self._length, self._capacity = batch, length, capacity
        self._num_complete = [n // plan.options.chunk_size for n in plan.aligned.lengths]

    def slots(self, num_tokens: int) -> Tensor:
        """Slots `[B, Hkv, T]` after `num_tokens` new tokens of each row."""
        aligned, size = self._plan.aligned, self._plan.options.chunk_size
        ends = [
            min(n, (pending + num_tokens) // size)
            for n, pending in zip(self._num_complete, aligned.pending, strict=True)
        ]
        return self.of_tokens(self.carried(ends)[0])

    def of_tokens(self, chunks: Tensor) -> Tensor:
        """Slots in the layout of the call, `[B, Hkv, T]`, from slots by chunk `[num_chunks, W, Hkv]`."""
        # Shifted by 1, as `unalign` fills padding with 0.
        x = self._plan.aligned.unalign(chunks[..., None] + 1, self._batch, self._length)
        return x[..., 0].transpose(1, 2) - 1

    def of_chunks(self) -> Tensor:
        """Slot of each token right after its own chunk, `[num_chunks, W, Hkv]`."""
        found = torch.full_like(self._learned.slots, -1, dtype=torch.int64)
        for first, n in zip(self._plan.aligned.first_chunk, self._num_complete, strict=True):
            found[first : first + n] = self._learned.slots[first : first + n]
        return found

    def carried(self, ends: Sequence[int] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Slots after the first `ends[r]` chunks of each sorted row; None for all chunks.

        Returns:
            The slots of the tokens by chunk `[num_chunks, W, Hkv]`, of the slots of the initial state
            `[R, Hkv, M]`, and of the tokens that were pending in it `[R, Hkv, C]`.
        """
        aligned = self._plan.aligned
        slots, moved = self._learned.slots, self._learned.moved
        ends = self._num_complete if ends is None else ends
        num_heads, device = slots.shape[2], slots.device
        found = torch.full_like(slots, -1, dtype=torch.int64)
        # Walking back from the last chunk, `to` maps slots after the current chunk to final slots.
        to = torch.arange(self._capacity, device=device).repeat(len(ends), num_heads, 1)
        for i in reversed(range(max(ends, default=0))):
            rows = [r for r, end in enumerate(ends) if end > i]
            chunks = [aligned.first_chunk[r] + i for r in rows]
            of_rows = to[rows]
            found[chunks] = of_rows.gather(2, slots[chunks].transpose(1, 2).long()).transpose(1, 2)
            if moved is not None:
                to[rows] = of_rows.gather(2, moved[chunks].long())
        pending = to.new_full((len(ends), num_heads, aligned.chunk_size), -1)
        for r, num in enumerate(aligned.pending):
            if num:
                pending[r, :, :num] = found[aligned.first_chunk[r], :num].transpose(0, 1)
        return found, to, pending
