"""`Call`: the checked arguments of one call of `ovq_attention`, as passed to every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ovq.ops.options import Options
from ovq.ops.state import OVQState, tensors_of


@dataclasses.dataclass(frozen=True)
class Rows:
    """Range of each row's real tokens in the flattened `[B * T]`: `lengths[r]` tokens from `starts[r]` on."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, bounds: Tensor) -> Rows:
        """`Rows` from the tensor `RowBounds.bounds`."""
        starts, lengths = bounds.tolist()
        return cls(tuple(starts), tuple(lengths))

    def __len__(self) -> int:
        return len(self.starts)


@dataclasses.dataclass(frozen=True, eq=False)
class RowBounds:
    """The checked rows of a call, passed instead of the attention mask or offsets they were computed from.

    A model computes them once for all of its layers. They are a tensor, so that one compiled graph serves
    rows of any lengths.

    Attributes:
        bounds: `[2, R]` int64 on the CPU, starts and lengths as in `Rows`.
    """

    bounds: Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """The checked arguments of a call of the op.

    Attributes:
        q: `[B, T, H, K]`. k: `[B, T, Hkv, K]`. v: `[B, T, Hkv, V]`.
        scale: `[H]` in the dtype of the sums.
        state: the initial state, empty at the start of a stream; backends must not change it.
        rows: the range of each row's tokens.
        options: the settings that define the layer.
        wants_state: whether the caller requested the final state.
        token_weights: `[B, T, Hkv]` weights of the tokens, in the dtype of the sums; None: all are 1.
        log_forget: `[B, T, Hkv]` log forget gates, clamped below, in float64; None without forgetting, and in
            the calls that `forget.py` makes for single chunks.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: Tensor
    state: OVQState
    rows: Rows
    options: Options
    wants_state: bool
    token_weights: Tensor | None = None
    log_forget: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of positions in the flattened input, B * T, including padding."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def gates(self) -> list[str]:
        """Names of the per-token gates that the call has."""
        return [name for name in ("token_weights", "log_forget") if getattr(self, name) is not None]

    @property
    def is_one_token(self) -> bool:
        """Whether the call has exactly one token per row."""
        is_column = self.q.shape[1] == 1 and len(self.rows) == self.q.shape[0]
        return is_column and min(self.rows.lengths, default=0) == 1

    @property
    def is_decoding(self) -> bool:
        """Whether the call has one token per row and needs no gradients."""
        return self.is_one_token and not self.wants_gradients

    @property
    def wants_gradients(self) -> bool:
        """Whether any tensor requires a gradient."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.floats)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the call."""
        given = (self.q, self.k, self.v, self.scale, self.token_weights, self.log_forget)
        return [*(x for x in given if x is not None), *tensors_of(self.state).values()]

    @property
    def floats(self) -> list[Tensor]:
        """All differentiable tensors of the call."""
        state = self.state
        memory = (state.key_sum, state.value_sum, state.pending_keys, state.pending_values)
        more = (state.weight, state.pending_weights, self.token_weights)
        forgetting = (state.pending_forget, self.log_forget)
        tensors = (self.q, self.k, self.v, self.scale, *memory, *more, *forgetting)
        return [x for x in tensors if x is not None]


#: A function that runs a call: `run` of a `Backend`, or a wrapper around it.
Run = Callable[[Call], tuple[Tensor, OVQState | None]]
