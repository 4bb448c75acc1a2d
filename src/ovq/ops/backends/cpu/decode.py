"""Decode steps, one token per row: one call of a kernel, and another when a chunk is complete."""

from __future__ import annotations

import ctypes
import math
import operator

import torch
from torch import Tensor

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.kernels import DTYPES, FORMATS, dense, merge
from ovq.ops.backends.cpu.mirrors import MIRRORS, Mirror
from ovq.ops.backends.torch.decode import merged_state
from ovq.ops.checks import is_memory
from ovq.ops.options import Options, rounding_sums
from ovq.ops.state import PENDING_TENSORS, SLOT_TENSORS, OVQState, pending_in, slots_in
from ovq.ops.transforms import needs_operations


class PreparedStep:
    """A decode step that is repeated without checking arguments or preparing those of the kernel again.

    One token takes a few microseconds of arithmetic. Checking the arguments, finding the backend of the call
    and passing the addresses of all tensors takes several times as long, and gives the same result for every
    token. So a state keeps the step that led to it, until its tensors change: when a chunk is merged, or
    states branch.

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
        self._sums, self._pending = slots_in(after), pending_in(after)
        self._tensors = [x for x in (*self._sums, *self._pending) if x is not None]
        (rows, _, heads, dim), (kv_heads, value_dim) = shapes[0], shapes[2][2:]
        sizes = (rows, kv_heads, heads // kv_heads, after.chunk_size, after.count.shape[2], dim, value_dim)
        self._call = call = MIRRORS["Decode"](*sizes, num_threads=1, dtype=DTYPES.index(dtype))
        call.state_dtype = FORMATS.index(options.state_dtype)
        call.weighs_chunk = options.weighs_chunk
        # Strides of contiguous tensors.
        call.q_row, call.k_row, call.v_row = heads * dim, kv_heads * dim, kv_heads * value_dim
        call.q_head, call.k_head, call.v_head = dim, dim, value_dim
        self._point(self._addresses())

    def _point(self, addresses: list[int]) -> None:
        self._known_addresses = addresses
        self._call.point(**dict(zip(PENDING_TENSORS, self._pending, strict=True)))
        sums = (x if x is None else x.contiguous() for x in self._sums)
        self._call.point(**dict(zip(SLOT_TENSORS, sums, strict=True)))

    def _addresses(self) -> list[int]:
        return [x.data_ptr() for x in self._tensors]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # It holds addresses of tensors, and a copy has other tensors: a copied state has no step.
        return type(None), ()

    def continues(self, state: OVQState, options: Options) -> bool:
        """Whether this step serves the next token of a state: same options and tensors, no gradient."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        # The options of a call do not have the format of the state.
        if rounding_sums(options, self.options.state_dtype) is not self.options:
            return False
        if needs_operations():
            return False
        if (state.num_slots, state.chunk_size) != (options.num_slots, options.chunk_size):
            return False
        return all(map(operator.is_, self._sums, slots_in(state)))

    def fits(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        token_weights: Tensor | None,
        state: OVQState,
        options: Options,
    ) -> bool:
        """Whether these arguments of `ovq_attention` fit this step, so that nothing else need be checked."""
        if not self.continues(state, options):
            return False
        for x, shape in zip((q, k, v), self.shapes, strict=True):
            if not is_memory(x) or x.shape != shape or x.dtype != self.dtype or not x.is_cpu:
                return False
        return self._fits_weights(token_weights)

    def _fits_weights(self, token_weights: Tensor | None) -> bool:
        """Whether weights are given as before, on the CPU, non-negative and finite."""
        own = self._sums[3]
        if token_weights is None or own is None:
            return token_weights is own
        x = token_weights
        is_alike = isinstance(x, Tensor) and x.shape == self.shapes[1][:3] and x.dtype == own.dtype
        # Plain numbers take less time than operations on tensors.
        return is_alike and x.is_cpu and is_memory(x) and all(0 <= w < math.inf for w in x.flatten().tolist())

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

        The kernel writes the new token to the pending buffers of `after`, the `advanced` state of one with
        `num_seen` tokens, and reads these and the sums in place.
        """
        o = q.new_empty(*q.shape[:3], v.shape[3])
        call, _alive = self.call_of(after, num_seen)
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
        return o, self.leading_to(merged_state(after, completed(after), self.options, merge))

    def call_of(self, after: OVQState, num_seen: Tensor) -> tuple[Mirror, tuple[PreparedStep, Tensor]]:
        """Kernel arguments of the step, except queries and the new token, and what to keep alive meanwhile.

        Args:
            after: the state, with room for the new token.
            num_seen: `[B]` tokens before the new one.
        """
        step = self._of(after)
        if (addresses := step._addresses()) != step._known_addresses:
            # PyTorch moves tensors that it shares with another process.
            step._point(addresses)
        call = MIRRORS["Decode"].from_buffer_copy(step._call)
        num_seen = num_seen.contiguous()
        call.num_seen, call.num_threads = num_seen.data_ptr(), torch.get_num_threads()
        return call, (step, num_seen)

    def leading_to(self, after: OVQState) -> OVQState:
        """The state `after` this step, prepared to repeat it; its tensors may be new."""
        after._step = self._of(after)
        return after

    def _of(self, after: OVQState) -> PreparedStep:
        """This step with the tensors of a state."""
        own, found = (*self._sums, *self._pending), (*slots_in(after), *pending_in(after))
        if all(map(operator.is_, own, found)):
            return self
        return PreparedStep(self.options, self.shapes, self.dtype, after)


def completed(after: OVQState) -> list[int]:
    """The rows whose chunk is complete with the new token of an `advanced` state."""
    assert after._buffers is not None, "`advanced` makes them"
    size = after.chunk_size
    return [r for r, num in enumerate(after._buffers.written) if num == size]
