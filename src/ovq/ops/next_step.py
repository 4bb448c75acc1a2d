"""`NextStep`: a decode step like the one before it, whose arguments need not be checked again.

One token takes a few microseconds of arithmetic. Checking the arguments, and finding out which backend runs
the call, takes several times as long and gives the same answer at every token, so the state remembers it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ovq.ops.ablation import Ablation
from ovq.ops.options import Options


class Remembers(Protocol):
    """What a step looks at in an `OVQState`: the tensors of slots, and where it tells the next one."""

    key_sum: Tensor
    value_sum: Tensor
    count: Tensor
    weight: Tensor | None
    _next: NextStep[Any] | None


State = TypeVar("State", bound=Remembers)


class Run(Protocol[State]):
    """What runs a step."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: Tensor,
        state: State,
        token_weights: Tensor | None,
        /,
        *,
        options: Options,
    ) -> tuple[Tensor, State]:
        """The outputs, and the state after them; the scale is `[H]`, weights are `[B, 1, Hkv]`."""


def settings_of(
    *,
    num_slots: int,
    chunk_size: int,
    growth: str | None,
    init: str,
    merge: str,
    ablation: Ablation,
    value_weight: float,
    backend: str,
    scale: float | type[Tensor] | None,
) -> tuple:
    """The arguments of a call that have to be the same in the next step; `scale` is `Tensor` if it is one."""
    learning = (growth, init, merge, ablation, value_weight)
    return num_slots, chunk_size, *learning, backend, scale


@dataclasses.dataclass(eq=False)
class NextStep(Generic[State]):
    """What a decode step tells the next one, by way of its state.

    Attributes:
        run: what runs the step.
        options: the settings of the dictionary.
        shapes: shapes of q, k and v. dtype: their dtype, on a CPU.
        sums: the tensors of the dictionary that were checked, weights last, or None.
        scale: the scale of the step, `[H]` in the dtype of the sums.
        settings: the other arguments of the call.
    """

    run: Run[State]
    options: Options
    shapes: tuple[torch.Size, torch.Size, torch.Size]
    dtype: torch.dtype
    sums: tuple[Tensor, Tensor, Tensor, Tensor | None]
    scale: Tensor
    settings: tuple | None = None

    def told(self, after: State) -> State:
        """The state that such a step has led to, which now knows the next step; its dictionary may be new."""
        sums = after.key_sum, after.value_sum, after.count, after.weight
        is_same = all(x is y for x, y in zip(sums, self.sums, strict=True))
        after._next = self if is_same else dataclasses.replace(self, sums=sums)
        return after

    def fits(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, token_weights: Tensor | None, settings: tuple
    ) -> bool:
        """Whether a call is such a step: the same settings and dictionary, and tensors of the same kind."""
        if not self.continues(state, settings):
            return False
        for x, shape in zip((q, k, v), self.shapes, strict=True):
            if not isinstance(x, Tensor) or x.shape != shape or x.dtype != self.dtype or not x.is_cpu:
                return False
        return self._fits_weights(token_weights)

    def continues(self, state: State, settings: tuple) -> bool:
        """Whether the settings and the dictionary are the same."""
        if settings != self.settings or torch.is_grad_enabled():
            return False
        key_sum, value_sum, count, weight = self.sums
        if state.key_sum is not key_sum or state.value_sum is not value_sum or state.count is not count:
            return False
        return state.weight is weight

    def _fits_weights(self, token_weights: Tensor | None) -> bool:
        """Whether there are weights as there were, and such as may be."""
        if token_weights is None or self.sums[3] is None:
            return token_weights is self.sums[3]
        x = token_weights
        is_alike = isinstance(x, Tensor) and x.shape == self.shapes[1][:3] and x.dtype == self.sums[3].dtype
        # As plain numbers, which takes less time than operations on tensors.
        return is_alike and x.is_cpu and all(0 <= w < math.inf for w in x.flatten().tolist())
