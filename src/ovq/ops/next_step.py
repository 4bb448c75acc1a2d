"""`NextStep`: a decode step like the one before it, whose arguments need not be checked again.

One token takes a few microseconds of arithmetic. Checking the arguments, and finding out which backend runs
the call, takes several times as long and gives the same answer at every token, so the state remembers it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ovq.ops.state import OVQState

# From q, k, v, the scale `[H]` and the state: the outputs, and the state after them.
Run = Callable[[Tensor, Tensor, Tensor, Tensor, "OVQState"], "tuple[Tensor, OVQState]"]


@dataclasses.dataclass(eq=False)
class NextStep:
    """What a decode step tells the next one, by way of its state.

    Attributes:
        run: what runs the step.
        shapes: shapes of q, k and v. dtype: their dtype, on a CPU.
        sums: the tensors of the dictionary that were checked.
        scale: the scale of the step, `[H]` in the dtype of the sums.
        settings: the other arguments of the call.
    """

    run: Run
    shapes: tuple[torch.Size, torch.Size, torch.Size]
    dtype: torch.dtype
    sums: tuple[Tensor, Tensor, Tensor]
    scale: Tensor
    settings: tuple | None = None

    def fits(self, q: Tensor, k: Tensor, v: Tensor, state: OVQState, settings: tuple) -> bool:
        """Whether a call is such a step: the same settings and dictionary, and tensors of the same kind."""
        if settings != self.settings or torch.is_grad_enabled():
            return False
        for x, shape in zip((q, k, v), self.shapes, strict=True):
            if not isinstance(x, Tensor) or x.shape != shape or x.dtype != self.dtype or not x.is_cpu:
                return False
        key_sum, value_sum, count = self.sums
        return state.key_sum is key_sum and state.value_sum is value_sum and state.count is count
