"""The kernels as an autograd function: what `torch/chunk.py` does, for all streams in one call."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.mirrors import MIRRORS, Mirror
from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.learned import Learned, Merging
from ovq.ops.backends.plan import Plan
from ovq.ops.fading import LEAST_WEIGHT
from ovq.ops.first_order import first_order, saved_tensors
from ovq.ops.options import NUM_PARTS, TIE

# Dtypes of inputs, in the order of numbers.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Formats of sums, likewise; "float16" is none of `STATE_DTYPES`.
FORMATS = ("float32", "bfloat16", "float16", "int8")


def cpu_kernels() -> str:
    """Where the compiled kernels of the backend `cpu` are from, or why there are none.

    The answer is "compiled for this processor" (here, on first use), "compiled in advance for LEVEL" (they
    came with the package), "compiled for LEVEL" (`OVQ_CPU_KERNELS` asked for a level) or "not available:
    REASON". The first call builds them if necessary, as the first call of the op does. The answer holds for
    the life of the process.

    Example:
        >>> cpu_kernels().startswith(("compiled", "not available"))
        True
    """
    try:
        return build.origin()
    except build.Unavailable as error:
        return f"not available: {error}"


def is_available() -> bool:
    """Whether there are compiled kernels on this machine; warns once if they could not be built."""
    try:
        build.load()
    except build.SwitchedOff:
        return False
    except build.Unavailable as error:
        build.warn_once(error)
        return False
    return True


class CompiledAttention(torch.autograd.Function):
    """`ChunkAttention` run by the kernels; other arguments, results and the rewinding backward are the same.

    With `fading` `[num_chunks, Hkv]` (`with_forgetting`) there are no gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        fading: Tensor | None,
        plan: Plan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        token_weights: Tensor | None,
        *of_sums: Any,
    ) -> tuple[Tensor | None, ...]:
        """One call of the kernels."""
        q, k, v = (dense(x) for x in (q, k, v))
        sums = Dictionary(*of_sums).clone()
        o = q.new_empty(*q.shape[:3], v.shape[-1])
        # The log-sum-exp of each query, and the slot of each token of a complete chunk.
        lse, slots = sums.key_sum.new_empty(q.shape[:3]), k.new_zeros(k.shape[:3], dtype=torch.int32)
        call = _call(q, k, v, o, lse, scale, sums, slots, plan, token_weights, fading)
        changes: list[Tensor] = []
        if any(ctx.needs_input_grad) and (plan.options.merges_pairs or token_weights is not None):
            changes = _empty_changes(k, v, plan, has_weights=token_weights is not None)
            call.pass_changes(changes)
        build.load().ovq_forward(ctypes.byref(call))
        ctx.save_for_backward(q, k, v, scale, token_weights, o, *sums.tensors, lse, slots, *changes)
        ctx.plan, ctx.fading = plan, fading
        ctx.mark_non_differentiable(sums.count)
        ctx.set_materialize_grads(False)
        return o, *sums.tensors

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_o: Tensor | None, *grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        """One call of the kernels: the gradient of the final sums becomes that of the initial ones."""
        assert ctx.fading is None, "`forget.py` hands over what has gradients chunk by chunk"
        saved = saved_tensors(ctx)
        q, k, v, scale, token_weights, o, *final, lse, slots = saved[:12]
        changes = saved[12:]
        grad_o = torch.zeros_like(o) if grad_o is None else dense(grad_o)
        # Copies, because the kernels rewind them in place.
        sums = Dictionary(*final).clone()
        key_deposit, value_deposit, _, weight_deposit = sums.gradients(grad_sums).tensors
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        grad_scale = scale.new_zeros(len(ctx.plan.slots), q.shape[2], dtype=torch.float64)
        # Weights of tokens, and of slots. Zero for tokens that are not merged yet.
        has_grads = token_weights is not None and (ctx.needs_input_grad[6] or ctx.needs_input_grad[10])
        grad_weights = torch.zeros_like(token_weights) if has_grads else None
        call = _call(q, k, v, o, lse, scale, sums, slots, ctx.plan, token_weights)
        call.set_tokens(grad_o=grad_o, grad_q=grads[0], grad_k=grads[1], grad_v=grads[2])
        if changes:
            call.pass_changes(changes)
        call.point(key_deposit=key_deposit, value_deposit=value_deposit, grad_scale=grad_scale)
        call.point(weight_deposit=weight_deposit, grad_weights=grad_weights)
        build.load().ovq_backward(ctypes.byref(call))
        of_scale, of_sums = grad_scale.sum(0).to(scale.dtype), (key_deposit, value_deposit, None)
        return None, None, *grads, of_scale, grad_weights, *of_sums, weight_deposit


def merge(chunks: Merging, changes: Sequence[Tensor] = ()) -> Tensor:
    """Merge complete chunks, in place.

    Args:
        changes: tensors of `_empty_changes` for the slots that chunks change; empty if not wanted.

    Returns:
        The slot of each token, `[num_chunks, W, Hkv]`.
    """
    k, v = dense(chunks.k), dense(chunks.v)
    nothing, slots = k.new_empty(0), k.new_zeros(k.shape[:3], dtype=torch.int32)
    # Without query heads there is no attention.
    plan = dataclasses.replace(chunks.plan, group_size=0)
    given = (chunks.sums, slots, plan, chunks.token_weights, chunks.fading)
    call = _call(k, k, v, v, nothing, nothing, *given)
    if changes:
        call.pass_changes(changes)
    build.load().ovq_forward(ctypes.byref(call))
    return slots


def learn(chunks: Merging) -> Learned:
    """Merge complete chunks; return the slot of each token and the moves of slots."""
    if not chunks.plan.options.merges_pairs:
        return Learned(merge(chunks), None)
    changes = _empty_changes(chunks.k, chunks.v, chunks.plan, has_weights=chunks.token_weights is not None)
    source, target = changes[:2]
    # Chunks write only the slots that they changed, and -1 after them.
    source.fill_(-1)
    return Learned.of_moves(merge(chunks, changes), source, target, chunks.sums.count.shape[2])


def dense(x: Tensor) -> Tensor:
    """`x` with each vector contiguous in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


# Slots that chunks changed, the slots they were merged into, and their contents before (merged_slots.h), with
# which the backward undoes the merges.
_CHANGED_SLOTS = ("merged_slot", "merged_into", "merged_key", "merged_value", "merged_count", "merged_weight")


def _empty_changes(k: Tensor, v: Tensor, plan: Plan, *, has_weights: bool) -> list[Tensor]:
    """Allocate `_CHANGED_SLOTS` for every chunk.

    A chunk merges at most as many slots as it has tokens. With token weights, all slots that it changes are
    saved: at most two per such merge, or one per token where no slots are merged. Mostly they are fewer, but
    the system provides memory only once it is written to.
    """
    num = plan.options.chunk_size * (2 if has_weights and plan.options.merges_pairs else 1)
    shape = (k.shape[0], k.shape[2], num)
    changes = [
        k.new_empty(shape, dtype=torch.int32),
        k.new_empty(shape, dtype=torch.int32),
        k.new_empty(*shape, k.shape[3], dtype=torch.float32),
        k.new_empty(*shape, v.shape[3], dtype=torch.float32),
        k.new_empty(shape, dtype=torch.int64),
    ]
    return [*changes, k.new_empty(shape, dtype=torch.float32)] if has_weights else changes


class _Arguments(Mirror):
    """`Call` of call.h."""

    _fields_ = MIRRORS["Call"]._fields_

    def set_tokens(self, **tensors: Tensor) -> None:
        for name, x in tensors.items():
            strides = (ctypes.c_int64 * 3)(*x.stride()[:3])
            setattr(self, name, MIRRORS["Tokens"](self.place(x), strides, x.shape[-1]))

    def pass_changes(self, changes: Sequence[Tensor]) -> None:
        """Pass the tensors of `_empty_changes`, which the forward writes and the backward reads."""
        self.num_noted = changes[0].shape[2]
        self.point(**dict(zip(_CHANGED_SLOTS, changes, strict=False)))


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: Tensor,
    sums: Dictionary,
    slots: Tensor,
    plan: Plan,
    token_weights: Tensor | None,
    fading: Tensor | None = None,
) -> _Arguments:
    options, aligned = plan.options, plan.aligned
    call = _Arguments(
        num_rows=len(plan.slots),
        num_kv_heads=plan.num_kv_heads,
        group_size=plan.group_size,
        chunk_size=options.chunk_size,
        width=aligned.width,
        capacity=sums.count.shape[2],
        num_threads=torch.get_num_threads(),
        dtype=DTYPES.index(q.dtype),
        state_dtype=FORMATS.index(options.state_dtype),
        merges_pairs=options.merges_pairs,
        weighs_chunk=options.weighs_chunk,
        tie=TIE,
        value_weight=options.value_weight,
        num_parts=NUM_PARTS,
        mass_power=options.mass_power,
        least_weight=LEAST_WEIGHT,
    )
    starts = [0, *itertools.accumulate(len(sizes) for sizes in plan.slots)]
    call.set_tokens(q=q, k=k, v=v, o=o)
    call.point(
        lse=lse,
        scale=scale.contiguous(),
        key_sum=sums.key_sum,
        value_sum=sums.value_sum,
        count=sums.count,
        token_weights=None if token_weights is None else token_weights.contiguous(),
        weight=sums.weight,
        fading=None if fading is None else fading.contiguous(),
        slots=slots,
        first_chunk=slots.new_tensor(aligned.first_chunk, dtype=torch.int64),
        length=slots.new_tensor(aligned.lengths, dtype=torch.int64),
        schedule_start=slots.new_tensor(starts[:-1], dtype=torch.int64),
        num_merged=slots.new_tensor(plan.num_merged, dtype=torch.int64),
        schedule=slots.new_tensor(list(itertools.chain(*plan.slots))),
    )
    return call
