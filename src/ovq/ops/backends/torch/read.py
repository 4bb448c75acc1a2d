"""The read of the `torch` backend: softmax attention over [chunk | dictionary] for many heads at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ovq.ops.backends.dictionary import Dictionary
from ovq.ops.backends.torch.streams import Group, Step, block_size
from ovq.ops.selection import padded_to_blocks
from ovq.ops.sums import divisor, log_mass, log_token_weights


def without_non_finite(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Chunk values without non-finite entries, and a term that adds these entries to the outputs.

    Since 0 times NaN is NaN, a non-finite value would reach earlier outputs despite the causal mask. It is
    replaced by 0 and added to the outputs from its own token on.

    Args:
        values: `[S, w, V]`.

    Returns:
        The values with non-finite entries set to 0, and the term `[S, w, V]` to add to the outputs; None if
            all are finite.

    Example:
        >>> without_non_finite(torch.tensor([[[1.0], [torch.nan], [2.0]]]))
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
    """Computes attention for the steps of a group, block by block of queries, in preallocated scratch memory.

    Keys and values are stored in buffers with rows [last block ... first block | dictionary | spare]. The
    candidates of a block (its own tokens, earlier blocks and the dictionary) are then one contiguous range,
    ready for one matrix product.

    Products in 16-bit dtypes are rounded to 16 bits. This is precise enough for scores of unit vectors and
    log counts, but log weights and norm terms may be many times larger than the score differences that
    matter. Those are added, and the softmax computed, in the dtype of the sums.

    Args:
        group: the streams.
        q: all queries. v: all values.
        wide: the dtype of the sums.
        has_weights: whether tokens have weights.

    Attributes:
        means: `[S, padded M, K]` key means in the dtype of the sums, zero beyond the slots in use.
        mass: `[S, n, 1]` counts or weights to divide by, in that dtype.
        is_empty: `[S, n, 1]` mask of slots of zero mass.
        queries: `[S, G * b, K]` queries times scale of the last block.
    """

    def __init__(self, group: Group, q: Tensor, v: Tensor, wide: torch.dtype, *, has_weights: bool) -> None:
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
        self._probs = torch.empty_like(self._scores)
        self._has_norm = plan.options.ablation.bias == "count+norm"
        kind = wide if has_weights or self._has_norm else q.dtype
        self._wide_scores, self._wide_probs = self._scores, self._probs
        if kind != q.dtype:
            self._wide_scores, self._wide_probs = q.new_empty(2, queries * rows, dtype=wide)
        self._bias = q.new_zeros(group.num_streams, rows, dtype=kind)
        self._weighs_chunk = plan.options.weighs_chunk
        self._future = torch.ones(block, block, dtype=torch.bool, device=q.device).triu(1)
        self._causal = self._bias.new_zeros(block, block).masked_fill_(self._future, -torch.inf)

    def load(
        self, step: Step, k: Tensor, v: Tensor, sums: Dictionary, token_weights: Tensor | None = None
    ) -> None:
        """Load the step's keys and values and the slot means into the buffers.

        Args:
            k: all keys. v: all values.
            sums: the dictionaries that the step's queries read.
            token_weights: all weights; used if tokens of the own chunk are read with their weights.
        """
        s, n, width = step.num_streams, step.num_slots, self._width
        chunk_keys, chunk_values = step.take(k), step.take(v)
        values, self._non_finite = without_non_finite(chunk_values)
        self._has_non_finite_key = not bool(chunk_keys.isfinite().all())
        for block in step.blocks:
            rows = slice(width - block.stop, width - block.start)
            self._keys[:s, rows] = chunk_keys[:, block]
            self._values[:s, rows] = values[:, block]
            if self._weighs_chunk:
                assert token_weights is not None
                self._bias[:s, rows] = log_token_weights(step.take(token_weights)[:, block, 0])
        mass = sums.mass[:s, :n]
        # log 0 = -inf excludes spare slots. Their keys and values are zero, or stale but finite.
        self._bias[:s, width : width + n] = log_mass(mass, self._wide)
        self._bias[:s, width + n :] = -torch.inf
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
        """Probabilities `[S, G * b, R]` of a block over its R candidates, valid until the next call."""
        size = block.stop - block.start
        part = step.part(q, block)
        queries = self._queries[: part.numel()].view(part.shape)
        torch.mul(part, scale[step.query_heads][:, None, None], out=queries)
        self.queries = queries.view(step.num_streams, -1, q.shape[-1])
        scores, probs = self._shaped(step, block, self._wide_scores, self._wide_probs)
        by_token = scores.view(step.num_streams, -1, size, scores.shape[-1])
        bias = self._bias[: step.num_streams, None, None, self._width - block.stop : self._rows]
        keys = self.keys(step, block).transpose(1, 2)
        is_wide = scores.dtype != keys.dtype
        if is_wide:
            scores.copy_(torch.bmm(self.queries, keys, out=self._shaped(step, block, self._scores)[0]))
            by_token += bias
        else:
            by_token[..., :size] = bias[..., :size] + self._causal[:size, :size]
            by_token[..., size:] = bias[..., size:]
            scores.baddbmm_(self.queries, keys)
        if self._has_norm:
            half_norms = self.half_norms(step, block)[:, None, None]
            by_token.sub_(step.scales(scale)[:, :, None, None] * half_norms)
        if is_wide or self._has_non_finite_key:
            # -inf plus the score of a non-finite key may be NaN.
            by_token[..., :size].masked_fill_(self._future[:size, :size], -torch.inf)
        torch.softmax(scores, -1, out=probs)
        return self._shaped(step, block, self._probs)[0].copy_(probs) if is_wide else probs

    def grad_scores(self, step: Step, block: slice, grad_o: Tensor, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients `[S, G * b, R]` of the scores of the last block, dS = P (dP - sum(P dP)).

        Args:
            grad_o: `[S, G * b, V]` gradient of the outputs.
            inner: `[S, G * b, 1]` sum(P dP) up to the rounding of the outputs, in the dtype of the sums.

        Returns:
            The gradients in the dtype of the products and in the dtype of the softmax, in scratch memory.
        """
        narrow, probs = self._shaped(step, block, self._scores, self._wide_probs)
        # Differences are rounded, not the larger products. They are converted before they are multiplied, as
        # operations on mixed dtypes are slow.
        values = self.values(step, block).transpose(1, 2)
        wide = torch.baddbmm(inner.to(narrow.dtype), grad_o, values, beta=-1, out=narrow)
        if probs.dtype != narrow.dtype:
            wide = self._shaped(step, block, self._wide_scores)[0].copy_(narrow)
        wide.mul_(probs)
        if narrow.dtype != inner.dtype:
            # Each row adds up to 0, but for the rounding of the outputs. In the gradients of gates and of the
            # scale, which are sums over many rows, that would add up.
            wide.addcmul_(probs, wide.sum(-1, keepdim=True), value=-1)
        return narrow.copy_(wide), wide

    def read(self, step: Step, block: slice, q: Tensor, scale: Tensor) -> Tensor:
        """Outputs `[S, G * b, V]` of a block."""
        o = torch.bmm(self.attend(step, block, q, scale), self.values(step, block))
        if self._non_finite is not None:
            size = block.stop - block.start
            o = (o.unflatten(1, (-1, size)) + self._non_finite[:, None, block]).flatten(1, 2)
        return o

    def keys(self, step: Step, block: slice) -> Tensor:
        """Keys `[S, R, K]` of a block's candidates."""
        return self._keys[: step.num_streams, self._width - block.stop : self._rows]

    def values(self, step: Step, block: slice) -> Tensor:
        """Values `[S, R, V]` of a block's candidates."""
        return self._values[: step.num_streams, self._width - block.stop : self._rows]

    def half_norms(self, step: Step, block: slice) -> Tensor:
        """|D|^2 / 2 `[S, R]` of the keys of a block's candidates, with `bias="count+norm"`."""
        return self._half_norms[: step.num_streams, self._width - block.stop : self._rows]

    def _shaped(self, step: Step, block: slice, *buffers: Tensor) -> list[Tensor]:
        """Buffers as `[S, G * b, R]`."""
        queries = step.group.plan.group_size * (block.stop - block.start)
        shape = (step.num_streams, queries, block.stop + self._rows - self._width)
        return [x[: math.prod(shape)].view(shape) for x in buffers]
