"""`Call`: one call of `ovq_attention` with checked arguments, in the form that every backend receives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ovq.ops.options import Options
from ovq.ops.state import OVQState


@dataclasses.dataclass(frozen=True)
class Rows:
    """The real tokens of each row in the flattened `[B * T]`: `lengths[r]` of them from `starts[r]` on."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, bounds: Tensor) -> Rows:
        """The rows of `RowBounds.bounds`."""
        starts, lengths = bounds.tolist()
        return cls(tuple(starts), tuple(lengths))

    def __len__(self) -> int:
        return len(self.starts)


@dataclasses.dataclass(frozen=True, eq=False)
class RowBounds:
    """The rows of a call, already checked; passed in place of the mask or the offsets that they came from.

    A model makes them once for all of its layers. They are held in a tensor, so that one compiled graph
    serves rows of any lengths.

    Attributes:
        bounds: `[2, R]` int64 on the CPU, starts and lengths as in `Rows`.
    """

    bounds: Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Call:
    """A call of the op.

    Attributes:
        q: `[B, T, H, K]`. k: `[B, T, Hkv, K]`. v: `[B, T, Hkv, V]`.
        scale: `[H]` in the dtype of the sums.
        state: the state to continue from, empty at the start of a stream; backends must not change it.
        rows: where the tokens of each row lie.
        options: the settings that define the layer.
        wants_state: whether the caller asked for the state afterwards.
        token_weights: `[B, T, Hkv]` weights with which tokens are merged, in the dtype of the sums; None for
            1 throughout.
        log_forget: `[B, T, Hkv]` logs of what tokens leave of everything before them, bounded below, in
            float64; None for 0 throughout, and in the calls of pieces that `forget.py` makes.
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
        """Positions in the flattened input, B * T, padding included."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def gates(self) -> list[str]:
        """The arguments with a number for each token that the call has."""
        return [name for name in ("token_weights", "log_forget") if getattr(self, name) is not None]

    @property
    def is_one_token(self) -> bool:
        """Whether this is one token per row."""
        is_column = self.q.shape[1] == 1 and len(self.rows) == self.q.shape[0]
        return is_column and min(self.rows.lengths, default=0) == 1

    @property
    def is_decoding(self) -> bool:
        """Whether this is one token per row, without gradients."""
        return self.is_one_token and not self.wants_gradients

    @property
    def wants_gradients(self) -> bool:
        """Whether any of the tensors is to get a gradient."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.floats)

    @property
    def floats(self) -> list[Tensor]:
        """The tensors that can have gradients."""
        state = self.state
        memory = (state.key_sum, state.value_sum, state.pending_keys, state.pending_values)
        more = (state.weight, state.pending_weights, self.token_weights)
        forgetting = (state.pending_forget, self.log_forget)
        tensors = (self.q, self.k, self.v, self.scale, *memory, *more, *forgetting)
        return [x for x in tensors if x is not None]


#: Runs a call: `run` of a `Backend`, or what goes through a call in its place.
Run = Callable[[Call], tuple[Tensor, OVQState | None]]
