"""A call without a state as operators of `torch.library`: opaque to `torch.compile` and `torch.export`.

`ovq::attention` is a whole call: all that depends on lengths and the schedule is computed inside, so that a
compiled graph holds one node for it and fits all lengths. A graph passes on only tensors, so the backward
prepares the call again. Outside of graphs a call is prepared once (`chunk.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.triton.launch import Saved, backward, forward
from ovq.ops.backends.triton.merging import Gone
from ovq.ops.backends.triton.work import Work
from ovq.ops.call import Rows
from ovq.ops.options import Options


@torch.library.custom_op("ovq::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    bounds: Tensor,
    num_slots: int,
    chunk_size: int,
    growth: str,
    merge: str,
    value_weight: float,
    is_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs `[B, T, H, V]` of a call without initial or final state, and what its backward needs.

    Args:
        q: `[B, T, H, K]`. k: `[B, T, Hkv, K]`. v: `[B, T, Hkv, V]`.
        scale: `[H]` float32.
        bounds: `[2, R]` as in `ovq.ops.call.RowBounds`.
        num_slots: N.
        chunk_size: C.
        growth: the schedule.
        merge: the merge rule, `"existing"` or `"nearest"`.
        value_weight: w of the latter.
        is_kept: whether there will be a backward, which needs the slots that were merged into others.

    Returns:
        The outputs; then the final sums and counts with N slots, for rows sorted by length; then the
        log2-sum-exp2 of the queries and the slots of the keys, chunk-aligned and flat, with room for
        `_num_places` tokens; then the attributes of `Gone`, flat as well, empty unless they are kept.
    """
    streams = (bounds.shape[1], k.shape[2], num_slots)
    sums = Dictionary(
        scale.new_zeros(*streams, k.shape[3]),
        scale.new_zeros(*streams, v.shape[3]),
        scale.new_zeros(streams, dtype=torch.int64),
    )
    places = _num_places(q, bounds, chunk_size)
    lse = scale.new_zeros(places * q.shape[2])
    slots = scale.new_zeros(places * k.shape[2], dtype=torch.int32)
    gone = _flat_gone(k, v, scale, places if is_kept and merge == "nearest" else 0)
    if bool(bounds[1].any()):
        call = _Prepared(q, k, bounds, num_slots, chunk_size, growth, merge, value_weight)
        o = call.unalign(
            forward(
                call.align(q),
                call.align(k),
                call.align(v),
                scale.contiguous(),
                call.of_chunks(lse, q.shape[2]),
                call.of_chunks(slots, k.shape[2]),
                sums,
                call.work,
                call.gone(gone),
            )
        )
    else:
        o = q.new_zeros(*q.shape[:3], v.shape[3])
    return o, sums.key_sum, sums.value_sum, sums.count, lse, slots, *gone


def _num_places(q: Tensor, bounds: Tensor, chunk_size: int) -> int:
    """Enough places for all tokens in whole chunks, whatever the lengths, so that the graph fits any."""
    return q.shape[0] * q.shape[1] + bounds.shape[1] * (chunk_size - 1)


@attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    bounds: Tensor,
    num_slots: int,
    chunk_size: int,
    growth: str,
    merge: str,
    value_weight: float,
    is_kept: bool,
) -> tuple[Tensor, ...]:
    streams, places = (bounds.shape[1], k.shape[2], num_slots), _num_places(q, bounds, chunk_size)
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        scale.new_empty(*streams, k.shape[3]),
        scale.new_empty(*streams, v.shape[3]),
        scale.new_empty(streams, dtype=torch.int64),
        scale.new_empty(places * q.shape[2]),
        scale.new_empty(places * k.shape[2], dtype=torch.int32),
        *_flat_gone(k, v, scale, places if is_kept and merge == "nearest" else 0),
    )


def _flat_gone(
    k: Tensor, v: Tensor, scale: Tensor, places: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for the attributes of `Gone` with a merge per place and head, flat; what is not used is zero."""
    num = places * k.shape[2]
    return (
        scale.new_zeros(num, dtype=torch.int32),
        scale.new_zeros(num, dtype=torch.int32),
        scale.new_zeros(num, dtype=torch.int64),
        scale.new_zeros(num * k.shape[3]),
        scale.new_zeros(num * v.shape[3]),
    )


@torch.library.custom_op("ovq::attention_backward", mutates_args=())
def attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    bounds: Tensor,
    o: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    count: Tensor,
    lse: Tensor,
    slots: Tensor,
    gone_slot: Tensor,
    gone_into: Tensor,
    gone_count: Tensor,
    gone_keys: Tensor,
    gone_values: Tensor,
    num_slots: int,
    chunk_size: int,
    growth: str,
    merge: str,
    value_weight: float,
    is_kept: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the scale, from the arguments of `attention` and what it returned."""
    if not bool(bounds[1].any()):
        return _like(q, k, v, scale)
    call = _Prepared(q, k, bounds, num_slots, chunk_size, growth, merge, value_weight)
    saved = Saved(
        call.align(q),
        call.align(k),
        call.align(v),
        scale.contiguous(),
        call.align(o),
        call.of_chunks(lse, q.shape[2]),
        call.of_chunks(slots, k.shape[2]),
        call.gone((gone_slot, gone_into, gone_count, gone_keys, gone_values)),
    )
    final = Dictionary(key_sum, value_sum, count).clone()
    grads = Dictionary(torch.zeros_like(key_sum), torch.zeros_like(value_sum), count)
    of_q, of_k, of_v, grad_scale, _ = backward(saved, call.align(grad_o), final, grads, call.work)
    return call.unalign(of_q), call.unalign(of_k), call.unalign(of_v), grad_scale


def _like(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contiguous zeros of the shapes of q, k, v and the scale."""
    return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape), scale.new_zeros(scale.shape)


@attention_backward.register_fake
def _(grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _like(q, k, v, scale)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.options = inputs[5:]


def _backward(ctx: Any, grad_o: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return *attention_backward(grad_o, *ctx.saved_tensors, *ctx.options), *[None] * 7


attention.register_autograd(_backward, setup_context=_setup_context)


class _Prepared:
    """A call without a state: its work, and its chunk-aligned tensors; arguments as for `attention`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        bounds: Tensor,
        num_slots: int,
        chunk_size: int,
        growth: str,
        merge: str,
        value_weight: float,
    ) -> None:
        nothing = [0] * bounds.shape[1]
        self._shape = q.shape[:2]
        self._aligned = AlignedRows(
            Rows.of(bounds), pending=nothing, chunk_size=chunk_size, num_tokens=q.shape[0] * q.shape[1]
        )
        plan = Plan.make(
            self._aligned,
            opened=nothing,
            num_merged=nothing,
            num_kv_heads=k.shape[2],
            group_size=q.shape[2] // k.shape[2],
            options=Options(
                num_slots=num_slots,
                chunk_size=chunk_size,
                growth=growth,
                init="novelty",
                merge=merge,
                value_weight=value_weight,
                seed=0,
            ),
        )
        self.work = Work(plan, num_slots, q.device)

    def align(self, x: Tensor) -> Tensor:
        """`[B, T, H, D]` as contiguous chunks `[num_chunks, W, H, D]`."""
        return self._aligned.align(x, None).contiguous()

    def unalign(self, chunks: Tensor) -> Tensor:
        """Chunks as contiguous `[B, T, H, D]`."""
        return self._aligned.unalign(chunks, *self._shape).contiguous()

    def of_chunks(self, flat: Tensor, num_heads: int) -> Tensor:
        """The beginning of a flat tensor as `[num_chunks, heads, W]`."""
        shape = (self._aligned.num_chunks, num_heads, self._aligned.width)
        return flat[: shape[0] * shape[1] * shape[2]].view(shape)

    def gone(self, flat: tuple[Tensor, ...]) -> Gone | None:
        """The flat attributes of `Gone` as those of the chunks; None if they are not kept."""
        room = len(flat[0])
        if not room:
            return None
        size = self.work.options.chunk_size
        # In rows that fit in one incomplete chunk nothing is merged.
        num = self._aligned.num_chunks if self._aligned.width == size else 0
        shape = (num, self.work.num_kv_heads, size)
        places = num * self.work.num_kv_heads * size
        slot, into, count = (x[:places].view(shape) for x in flat[:3])
        keys, values = (x.view(room, -1)[:places].view(*shape, len(x) // room) for x in flat[3:])
        return Gone(slot, into, count, keys, values)
