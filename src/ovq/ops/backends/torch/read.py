"""The read of the `torch` backend: a softmax over [chunk | dictionary] for many heads at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.torch.streams import Group, Step, block_size
from ovq.ops.selection import padded_to_blocks
from ovq.ops.state import divisor, log_mass, log_token_weights


def without_spoilt(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Values of a chunk that may be multiplied by probabilities of zero for later tokens.

    Zero times NaN is NaN: a value that is not finite would reach earlier outputs. It is taken out, and added
    to the outputs from its token on.

    Args:
        values: `[S, w, V]`.

    Returns:
        The values with zeros in such places, and what must be added to outputs `[S, w, V]`; None if all are
            finite.

    Example:
        >>> without_spoilt(torch.tensor([[[1.0], [torch.nan], [2.0]]]))
        (tensor([[[1.],
                 [0.],
                 [2.]]]), tensor([[[0.],
                 [nan],
                 [nan]]]))
    """
    is_finite = values.isfinite()
    if bool(is_finite.all()):
        return values, None
    return values.masked_fill(~is_finite, 0), values.masked_fill(is_finite, 0).cumsum(1)


class Reader:
    """Reads the steps of a group, one block of queries after the other, in scratch memory allocated once.

    Keys and values lie in buffers of rows [last block ... first block | dictionary | spare]. What a block
    attends to (itself, the blocks before it and the dictionary) is then one contiguous range, ready for one
    matrix product.

    Attributes:
        means: `[S, padded M, K]` key means in the dtype of the sums, zero beyond the slots in use.
        mass: `[S, n, 1]` counts or weights to divide by, in that dtype.
        is_empty: `[S, n, 1]` slots without tokens, or with tokens of weight 0 only.
        queries: `[S, G * b, K]` the queries, times scale, of the block attended last.
    """

    def __init__(self, group: Group, q: Tensor, v: Tensor, wide: torch.dtype) -> None:
        plan = group.plan
        self._width, self._wide = plan.aligned.width, wide
        capacity = padded_to_blocks(plan.capacity)
        rows = self._width + capacity
        self._keys = q.new_zeros(group.num_streams, rows, q.shape[-1])
        self._values = q.new_zeros(group.num_streams, rows, v.shape[-1])
        means = self._keys[:, self._width :]
        self._means = means if q.dtype == wide else torch.zeros_like(means, dtype=wide)
        block = block_size(plan)
        queries = group.num_streams * plan.group_size * block
        self._queries = q.new_empty(queries * q.shape[-1])
        self._scores = q.new_empty(queries * rows)
        self._bias = q.new_full((group.num_streams, 1, 1, capacity), -torch.inf)
        self._probs = torch.empty_like(self._scores)
        self._future = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)
        self._causal = q.new_zeros(block, block).masked_fill_(self._future, -torch.inf)
        self._has_norm = plan.options.bias == "count+norm"
        self._token_bias: Tensor | None = None
        if plan.options.weighs_chunk:
            self._token_bias = q.new_zeros(group.num_streams, self._width)

    def load(
        self, step: Step, k: Tensor, v: Tensor, sums: Dictionary, token_weights: Tensor | None = None
    ) -> None:
        """Put the step's keys and values and the current means side by side.

        Args:
            step: the step.
            k: all keys. v: all values.
            sums: the dictionaries that its queries see.
            token_weights: all weights, where tokens of the own chunk are read with them.
        """
        s, n, width = step.num_streams, step.num_slots, self._width
        chunk_keys, chunk_values = step.take(k), step.take(v)
        values, self._spoilt = without_spoilt(chunk_values)
        self._is_key_spoilt = not bool(chunk_keys.isfinite().all())
        for block in step.blocks:
            rows = slice(width - block.stop, width - block.start)
            self._keys[:s, rows] = chunk_keys[:, block]
            self._values[:s, rows] = values[:, block]
            if self._token_bias is not None:
                assert token_weights is not None
                self._token_bias[:s, rows] = log_token_weights(step.take(token_weights)[:, block, 0])
        mass = sums.mass[:s, :n]
        # log 0 = -inf excludes spare slots. Their keys and values are zero, or finite and out of date.
        self._bias[:s, 0, 0, :n] = log_mass(mass, self._wide)
        self._bias[:s, ..., n:] = -torch.inf
        self._rows = width + padded_to_blocks(n)
        self.is_empty = (mass <= 0).unsqueeze(-1)
        self.mass = divisor(mass, self._wide).unsqueeze(-1)
        self.means = self._means[:s]
        torch.div(sums.key_sum[:s, :n], self.mass, out=self.means[:, :n])
        values = self._values[:s, width : width + n]
        if self._values.dtype == self._wide:
            torch.div(sums.value_sum[:s, :n], self.mass, out=values)
        else:
            self._keys[:s, width : width + n] = self.means[:, :n]
            values.copy_(sums.value_sum[:s, :n] / self.mass)
        if self._has_norm:
            self._half_norms = self._keys[:s].to(self._wide).square().sum(-1) / 2

    def attend(self, step: Step, block: slice, q: Tensor, scale: Tensor) -> Tensor:
        """Probabilities `[S, G * b, R]` of a block over its R candidates, in scratch memory until the next
        call."""
        size = block.stop - block.start
        part = step.part(q, block)
        queries = self._queries[: part.numel()].view(part.shape)
        torch.mul(part, scale[step.query_heads][:, None, None], out=queries)
        self.queries = queries.view(step.num_streams, -1, q.shape[-1])
        scores, probs = self.scratch(step, block)
        by_token = scores.view(step.num_streams, -1, size, scores.shape[-1])
        by_token[..., :size] = self._causal[:size, :size]
        by_token[..., size : block.stop] = 0
        by_token[..., block.stop :] = self._bias[: step.num_streams, ..., : self._rows - self._width]
        if self._token_bias is not None:
            own = self._token_bias[: step.num_streams, self._width - block.stop :]
            by_token[..., : block.stop] += own[:, None, None]
        if self._has_norm:
            half_norms = self.half_norms(step, block)[:, None, None]
            by_token.sub_(step.scales(scale)[:, :, None, None] * half_norms)
        scores.baddbmm_(self.queries, self.keys(step, block).transpose(1, 2))
        if self._is_key_spoilt:
            # The sum of -inf and the score of a key that is not finite may be NaN.
            by_token[..., :size].masked_fill_(self._future[:size, :size], -torch.inf)
        return torch.softmax(scores, -1, out=probs)

    def read(self, step: Step, block: slice, q: Tensor, scale: Tensor) -> Tensor:
        """Outputs `[S, G * b, V]` of a block."""
        o = torch.bmm(self.attend(step, block, q, scale), self.values(step, block))
        if self._spoilt is not None:
            size = block.stop - block.start
            o.view(step.num_streams, -1, size, o.shape[-1]).add_(self._spoilt[:, None, block])
        return o

    def keys(self, step: Step, block: slice) -> Tensor:
        """Keys `[S, R, K]` that a block attends to."""
        return self._keys[: step.num_streams, self._width - block.stop : self._rows]

    def values(self, step: Step, block: slice) -> Tensor:
        """Values `[S, R, V]` that a block attends to."""
        return self._values[: step.num_streams, self._width - block.stop : self._rows]

    def half_norms(self, step: Step, block: slice) -> Tensor:
        """|D|^2 / 2 `[S, R]` of the keys that a block attends to, with `bias="count+norm"`."""
        return self._half_norms[: step.num_streams, self._width - block.stop : self._rows]

    def scratch(self, step: Step, block: slice) -> tuple[Tensor, Tensor]:
        """Two buffers `[S, G * b, R]`; the first is free once `attend` has returned the second."""
        queries = step.group.plan.group_size * (block.stop - block.start)
        shape = (step.num_streams, queries, block.stop + self._rows - self._width)
        size = shape[0] * shape[1] * shape[2]
        return self._scores[:size].view(shape), self._probs[:size].view(shape)
