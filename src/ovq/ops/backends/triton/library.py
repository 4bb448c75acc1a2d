"""The kernels as operators of `torch.library`: opaque to `torch.compile` and `torch.export`, differentiable.

`ovq::attention` is a whole call: what depends on lengths, the schedule and the state is worked out inside, so
that a compiled graph holds one node and stays the same for all lengths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.plan import Plan
from ovq.ops.backends.triton.launch import Saved, backward, forward
from ovq.ops.backends.triton.work import Work
from ovq.ops.call import Rows
from ovq.ops.checks import checked_rows
from ovq.ops.options import Options


@torch.library.custom_op("ovq::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    count: Tensor,
    pending_keys: Tensor,
    pending_values: Tensor,
    num_seen: Tensor,
    bounds: Tensor,
    num_slots: int,
    chunk_size: int,
    growth: str,
    capacity: int,
    places: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """OVQ attention of a call, from a state to the next one (without its pending tokens).

    Args:
        q: `[B, T, H, K]`. k: `[B, T, Hkv, K]`. v: `[B, T, Hkv, V]`.
        scale: `[H]` float32.
        key_sum: `[R, Hkv, M, K]` of the state before, as are the next five.
        value_sum: `[R, Hkv, M, V]`.
        count: `[R, Hkv, M]`.
        pending_keys: `[R, Hkv, C, K]`.
        pending_values: `[R, Hkv, C, V]`.
        num_seen: `[R]`, on the CPU.
        bounds: `[2, R]` starts and lengths of the rows in the flattened `[B * T]`, on the CPU.
        num_slots: N.
        chunk_size: C.
        growth: the schedule.
        capacity: slots to return, at least as many as a row has at the end.
        places: tokens of all rows in whole chunks, or more.

    Returns:
        Outputs `[B, T, H, V]`; sums and counts with `capacity` slots; and for the backward the log2-sum-exp2
        of the queries and the slots of the tokens, flat, chunk-aligned.
    """
    prepared = _Prepared(q, k, count, num_seen, bounds, num_slots, chunk_size, growth, capacity)
    lse = torch.zeros(places * q.shape[2], dtype=torch.float32, device=q.device)
    slots = torch.zeros(places * k.shape[2], dtype=torch.int32, device=q.device)
    into = Dictionary(*(prepared.with_capacity(x) for x in (key_sum, value_sum, count)))
    if prepared.is_empty:
        o = q.new_zeros(*q.shape[:3], v.shape[3])
    else:
        chunks = (prepared.align(q), prepared.align(k, pending_keys), prepared.align(v, pending_values))
        flat = (prepared.of_chunks(lse, q.shape[2]), prepared.of_chunks(slots, k.shape[2]))
        # Triton launches on the current device, whichever the tensors are on.
        with torch.cuda.device_of(q):
            o = prepared.unalign(forward(*chunks, scale.contiguous(), *flat, into, prepared.work, chunk_size))
    sums = (prepared.restored(x) for x in (into.key_sum, into.value_sum, into.count))
    return o, *sums, lse, slots


@attention.register_fake
def _(q, k, v, scale, key_sum, value_sum, count, pending_keys, pending_values, num_seen, bounds, num_slots,
      chunk_size, growth, capacity, places):  # fmt: skip
    streams = key_sum.shape[:2]
    return (
        q.new_empty(*q.shape[:3], v.shape[3]),
        key_sum.new_empty(*streams, capacity, key_sum.shape[3]),
        value_sum.new_empty(*streams, capacity, value_sum.shape[3]),
        count.new_empty(*streams, capacity),
        scale.new_empty(places * q.shape[2]),
        scale.new_empty(places * k.shape[2], dtype=torch.int32),
    )


@torch.library.custom_op("ovq::attention_backward", mutates_args=())
def attention_backward(
    grad_o: Tensor,
    grad_key_sum: Tensor,
    grad_value_sum: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    count_before: Tensor,
    pending_keys: Tensor,
    pending_values: Tensor,
    num_seen: Tensor,
    bounds: Tensor,
    o: Tensor,
    key_sum: Tensor,
    value_sum: Tensor,
    count: Tensor,
    lse: Tensor,
    slots: Tensor,
    num_slots: int,
    chunk_size: int,
    growth: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention`: of q, k, v, the scale, the sums and the pending tokens of the state before.

    Args:
        grad_o: of the outputs. grad_key_sum, grad_value_sum: of the sums returned.
        count_before: the counts before; `count`, `key_sum`, `value_sum`: those returned.
        o, lse, slots: what `attention` returned. The others: its arguments.
    """
    capacity = count.shape[2]
    prepared = _Prepared(q, k, count_before, num_seen, bounds, num_slots, chunk_size, growth, capacity)
    grads = Dictionary(*(prepared.with_capacity(x) for x in (grad_key_sum, grad_value_sum, count)))
    if prepared.is_empty:
        tokens = [torch.zeros_like(x) for x in (q, k, v, scale)]
        pending = [torch.zeros_like(x) for x in (pending_keys, pending_values)]
    else:
        saved = Saved(
            prepared.align(q),
            prepared.align(k, pending_keys),
            prepared.align(v, pending_values),
            scale.contiguous(),
            prepared.align(o),
            prepared.of_chunks(lse, q.shape[2]),
            prepared.of_chunks(slots, k.shape[2]),
        )
        final = Dictionary(*(prepared.with_capacity(x) for x in (key_sum, value_sum, count)))
        with torch.cuda.device_of(q):
            *chunks, grad_scale = backward(
                saved, prepared.align(grad_o), final, grads, prepared.work, chunk_size
            )
        tokens = [*(prepared.unalign(x) for x in chunks), grad_scale]
        pending = [prepared.restored(prepared.aligned.head(x)) for x in chunks[1:]]
    num = count_before.shape[2]
    sums = [prepared.restored(x)[:, :, :num].contiguous() for x in (grads.key_sum, grads.value_sum)]
    return *tokens, *sums, *pending


@attention_backward.register_fake
def _(grad_o, grad_key_sum, grad_value_sum, q, k, v, scale, count_before, pending_keys, pending_values,
      num_seen, bounds, o, key_sum, value_sum, count, lse, slots, num_slots, chunk_size, growth):  # fmt: skip
    before = count_before.shape
    return (
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, scale)),
        key_sum.new_empty(*before, key_sum.shape[3]),
        value_sum.new_empty(*before, value_sum.shape[3]),
        *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (pending_keys, pending_values)),
    )


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, scale, _, _, count, *rest = inputs
    pending_keys, pending_values, num_seen, bounds, num_slots, chunk_size, growth, _, _ = rest
    o, key_sum, value_sum, count_after, lse, slots = output
    ctx.save_for_backward(
        q, k, v, scale, count, pending_keys, pending_values, num_seen, bounds,
        o, key_sum, value_sum, count_after, lse, slots,
    )  # fmt: skip
    ctx.options = (num_slots, chunk_size, growth)


def _backward(ctx, grad_o, grad_key_sum, grad_value_sum, *_):
    *tokens, sums_k, sums_v, pending_k, pending_v = attention_backward(
        grad_o, grad_key_sum, grad_value_sum, *ctx.saved_tensors, *ctx.options
    )
    return *tokens, sums_k, sums_v, None, pending_k, pending_v, *[None] * 7


attention.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("ovq::row_bounds", mutates_args=())
def row_bounds(q: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`[2, R]` starts and lengths of a call's rows, on the CPU; ValueError if mask or bounds do not fit."""
    rows = checked_rows(q, attention_mask, cu_seqlens)
    return torch.tensor([rows.starts, rows.lengths], dtype=torch.int64)


@row_bounds.register_fake
def _(q, attention_mask, cu_seqlens):
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty(2, num, dtype=torch.int64, device="cpu")


class _Prepared:
    """A call's rows, sorted by length, and its tensors in the aligned layout; arguments as of `attention`."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        count: Tensor,
        num_seen: Tensor,
        bounds: Tensor,
        num_slots: int,
        chunk_size: int,
        growth: str,
        capacity: int,
    ) -> None:
        starts, lengths = bounds.tolist()
        seen = num_seen.tolist()
        self.is_empty = not sum(lengths)
        self.aligned = AlignedRows(
            Rows(tuple(starts), tuple(lengths)),
            pending=[n % chunk_size for n in seen],
            chunk_size=chunk_size,
            num_tokens=q.shape[0] * q.shape[1],
        )
        self._order, self._is_sorted = self.aligned.order, self.aligned.is_sorted
        # The only values of tensors on a device that are looked at.
        opened = (count[:, 0] > 0).sum(-1).tolist() if count.shape[2] else [0] * len(seen)
        options = Options(
            num_slots=num_slots,
            chunk_size=chunk_size,
            growth=growth,
            init="novelty",
            merge="existing",
            seed=0,
        )
        plan = Plan.make(
            self.aligned,
            opened=[opened[r] for r in self._order],
            num_merged=[seen[r] // chunk_size * chunk_size for r in self._order],
            num_kv_heads=k.shape[2],
            group_size=q.shape[2] // k.shape[2],
            options=options,
        )
        assert capacity >= plan.capacity
        self.work = Work(plan, capacity, q.device)
        self._shape = q.shape[:2]

    def restored(self, x: Tensor) -> Tensor:
        """Sorted rows `[R, ...]` back in the order of the prepared."""
        return x if self._is_sorted else x[self.aligned.inverse()]

    def align(self, x: Tensor, pending: Tensor | None = None) -> Tensor:
        """`[B, T, H, D]` as contiguous chunks `[num_chunks, W, H, D]`."""
        if pending is not None and not self._is_sorted:
            pending = pending[self._order]
        return self.aligned.align(x, pending).contiguous()

    def unalign(self, chunks: Tensor) -> Tensor:
        """Chunks as contiguous `[B, T, H, D]`."""
        return self.aligned.unalign(chunks, *self._shape).contiguous()

    def with_capacity(self, x: Tensor) -> Tensor:
        """A copy of sums or counts `[R, Hkv, rows, ...]`, sorted, with the call's number of slots."""
        out = x.new_zeros(*x.shape[:2], self.work.capacity, *x.shape[3:])
        out[:, :, : x.shape[2]] = x if self._is_sorted else x[self._order]
        return out

    def of_chunks(self, flat: Tensor, num_heads: int) -> Tensor:
        """`[num_chunks, heads, W]`, the beginning of a flat tensor."""
        shape = (self.aligned.num_chunks, num_heads, self.aligned.width)
        return flat[: shape[0] * shape[1] * shape[2]].view(shape)
