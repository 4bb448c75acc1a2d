"""Decode steps, one token per row: one call of a kernel, and another when a chunk is complete."""

from __future__ import annotations

import ctypes
import math
import operator

import torch
from torch import Tensor

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.kernels import DTYPES, dense, merge
from ovq.ops.backends.cpu.mirrors import mirror_of
from ovq.ops.backends.torch.decode import merged_state
from ovq.ops.options import Options
from ovq.ops.state import OVQState


class PreparedStep:
    """A decode step whose arguments need not be checked, nor laid out for the kernel, when it is repeated.

    One token takes a few microseconds of arithmetic. Checking the arguments, finding out which backend runs
    the call, and telling the kernel where all tensors are takes several times as long and gives the same
    answer at every token. So the state that a step leads to remembers it, until its tensors are others: when
    a chunk is merged, or states branch.

    Args:
        options: the settings of the dictionary.
        shapes: of q, k and v.
        dtype: theirs.
        after: a state with room for the new token (`advanced`).
    """

    backend = "cpu"

    def __init__(
        self,
        options: Options,
        shapes: tuple[torch.Size, torch.Size, torch.Size],
        dtype: torch.dtype,
        after: OVQState,
    ) -> None:
        self.options, self.shapes, self.dtype = options, shapes, dtype
        self._sums = after.key_sum, after.value_sum, after.count, after.weight
        self._pending = after.pending_keys, after.pending_values, after.pending_weights
        self._kept = [x.contiguous() for x in self._sums if x is not None]
        rows, _, num_heads, key_dim = shapes[0]
        num_kv_heads, value_dim = shapes[2][2:]
        self._call = call = Decode(
            rows,
            num_kv_heads,
            num_heads // num_kv_heads,
            after.chunk_size,
            after.count.shape[2],
            key_dim,
            value_dim,
            1,
            DTYPES.index(dtype),
            weighs_chunk=options.weighs_chunk,
        )
        # Those of contiguous tensors.
        call.q_row, call.k_row, call.v_row = (
            num_heads * key_dim,
            num_kv_heads * key_dim,
            num_kv_heads * value_dim,
        )
        call.q_head, call.k_head, call.v_head = key_dim, key_dim, value_dim
        call.pending_keys = after.pending_keys.data_ptr()
        call.pending_values = after.pending_values.data_ptr()
        call.key_sum, call.value_sum, call.count = (x.data_ptr() for x in self._kept[:3])
        if after.weight is not None and after.pending_weights is not None:
            call.weight, call.pending_weights = self._kept[3].data_ptr(), after.pending_weights.data_ptr()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # It says where tensors lie, and those of a copy lie elsewhere: a copy of a state has no step.
        return type(None), ()

    def continues(self, state: OVQState, options: Options) -> bool:
        """Whether the next token of a state, by these options and without a gradient, is such a step."""
        if options is not self.options or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        key_sum, value_sum, count, weight = self._sums
        is_same = state.key_sum is key_sum and state.value_sum is value_sum and state.count is count
        return is_same and state.weight is weight

    def fits(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        token_weights: Tensor | None,
        state: OVQState,
        options: Options,
    ) -> bool:
        """Whether these arguments of `ovq_attention` are those of such a step, and so need no other check."""
        if not self.continues(state, options):
            return False
        for x, shape in zip((q, k, v), self.shapes, strict=True):
            if type(x) is not Tensor or x.shape != shape or x.dtype != self.dtype or not x.is_cpu:
                return False
        return self._fits_weights(token_weights)

    def _fits_weights(self, token_weights: Tensor | None) -> bool:
        """Whether there are weights as there were, and such as may be."""
        own = self._sums[3]
        if token_weights is None or own is None:
            return token_weights is own
        x = token_weights
        is_alike = isinstance(x, Tensor) and x.shape == self.shapes[1][:3] and x.dtype == own.dtype
        # As plain numbers, which takes less time than operations on tensors.
        return is_alike and x.is_cpu and all(0 <= w < math.inf for w in x.flatten().tolist())

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        token_weights: Tensor | None,
        num_seen: Tensor,
        after: OVQState,
    ) -> tuple[Tensor, OVQState]:
        """Outputs `[B, 1, H, V]` of checked tensors, and the state after them, which can repeat the step.

        The kernel puts the new token into the pending buffers of `after`, the `advanced` state of one with
        `num_seen` tokens, and reads these and the sums where they lie.
        """
        o = q.new_empty(*q.shape[:3], v.shape[3])
        call, _kept = self.call_of(after, num_seen)
        if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
            q, k, v = dense(q), dense(k), dense(v)
            call.q_row, call.k_row, call.v_row = (x.stride(0) for x in (q, k, v))
            call.q_head, call.k_head, call.v_head = (x.stride(2) for x in (q, k, v))
        scale = scale.contiguous()
        call.q, call.k, call.v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        call.o, call.scale = o.data_ptr(), scale.data_ptr()
        if token_weights is not None:
            token_weights = token_weights.contiguous()
            call.token_weights = token_weights.data_ptr()
        build.load().ovq_decode(ctypes.byref(call))
        return o, self.leading_to(with_merged_chunks(after, completed(after), self.options))

    def call_of(self, after: OVQState, num_seen: Tensor) -> tuple[Decode, tuple[PreparedStep, Tensor]]:
        """The step as a kernel takes it, without queries and the new token, and what to keep meanwhile.

        Args:
            after: the state, with room for the new token.
            num_seen: `[B]` tokens before the new one.
        """
        step = self._of(after)
        call = Decode.from_buffer_copy(step._call)
        num_seen = num_seen.contiguous()
        call.num_seen, call.num_threads = num_seen.data_ptr(), torch.get_num_threads()
        return call, (step, num_seen)

    def leading_to(self, after: OVQState) -> OVQState:
        """The state after such a step, which can repeat it; its tensors may be new."""
        after._step = self._of(after)
        return after

    def _of(self, after: OVQState) -> PreparedStep:
        """The same step on the tensors of a state."""
        own = (*self._sums, *self._pending)
        sums = after.key_sum, after.value_sum, after.count, after.weight
        found = (*sums, after.pending_keys, after.pending_values, after.pending_weights)
        if all(map(operator.is_, own, found)):
            return self
        return PreparedStep(self.options, self.shapes, self.dtype, after)


def completed(after: OVQState) -> list[int]:
    """The rows whose chunk the new token of an `advanced` state completes."""
    assert after._buffers is not None, "`advanced` makes them"
    size = after.chunk_size
    return [r for r, num in enumerate(after._buffers.written) if num == size]


def with_merged_chunks(after: OVQState, rows: list[int], options: Options) -> OVQState:
    """The state with the complete chunks of `rows` merged."""
    return merged_state(after, rows, options, merge) if rows else after


@mirror_of("Decode")
class Decode(ctypes.Structure):
    """`Decode` of decode.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_rows", "num_kv_heads", "group_size", "chunk_size")),
        *((name, ctypes.c_int64) for name in ("capacity", "key_dim", "value_dim", "num_threads", "dtype")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "o", "pending_keys", "pending_values")),
        *((name, ctypes.c_void_p) for name in ("scale", "key_sum", "value_sum", "count", "num_seen")),
        ("first_read", ctypes.c_void_p),
        *((f"{name}_{of}", ctypes.c_int64) for name in ("q", "k", "v") for of in ("row", "head")),
        *((name, ctypes.c_void_p) for name in ("token_weights", "weight", "pending_weights")),
        ("weighs_chunk", ctypes.c_int64),
    ]
