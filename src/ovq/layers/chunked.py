"""Shared parts of chunkwise recurrences with decay: delta rules, Mamba2, MesaNet, Raven."""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.layers.common import OwnWeights
from ovq.layers.constant import sum_dtype


class DecayRates(OwnWeights):
    """Step sizes and decays per head, as in Mamba2 and Gated DeltaNet, or per channel of a head, as in KDA.

    `step = softplus(x + dt_bias)`, `log decay = -exp(A_log) step`.

    Args:
        num_channels: K, if every channel of a head has its own step; they share `A_log`.
        rate_range: range of the uniform distribution of the initial rates `exp(A_log)`; None: log-uniform
            from 1 to 16.
    """

    def __init__(
        self,
        num_heads: int,
        num_channels: int | None = None,
        *,
        rate_range: tuple[float, float] | None = None,
    ):
        super().__init__()
        self.rate_range = rate_range
        channels = () if num_channels is None else (num_channels,)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, *channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw rates from `rate_range`, and steps log-uniformly from 0.001 to 0.1.

        For steps this small, the inverse of softplus is nearly the logarithm.
        """
        if self.rate_range is None:
            nn.init.uniform_(self.A_log, 0.0, math.log(16))
        else:
            nn.init.uniform_(self.A_log, *self.rate_range)
            with torch.no_grad():
                # Clamped, as log 0 would be -inf.
                self.A_log.clamp_(min=torch.finfo(self.A_log.dtype).tiny).log_()
        nn.init.uniform_(self.dt_bias, math.log(0.001), math.log(0.1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Steps and log decays for inputs `[..., H]` or `[..., H, K]`, of the same shape.

        Both are in float32 (float64 for float64 inputs).
        """
        wide = sum_dtype(x.dtype)
        step = F.softplus(x.to(wide) + self.dt_bias.to(wide))
        rate = self.A_log.to(wide).exp()
        return step, -(rate if self.dt_bias.dim() == 1 else rate[:, None]) * step


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """`[B, T, H, ...]` to `[B, H, n, chunk, ...]`, padded with zeros."""
    fill = -x.shape[1] % chunk
    if fill:
        x = torch.cat([x, x.new_zeros(x.shape[0], fill, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, chunk)).movedim(3, 1)


def from_chunks(x: Tensor, num_tokens: int) -> Tensor:
    """`[B, H, n, chunk, D]` back to `[B, T, H, D]`."""
    return x.flatten(2, 3)[:, :, :num_tokens].transpose(1, 2)


def decay_between(total: Tensor) -> Tensor:
    """Decay factors `[..., C, C]` from each token j (column) to each token i >= j of a chunk; 0 for j > i.

    `total` `[..., C]` are cumulative sums of the log decays.
    """
    size = total.shape[-1]
    is_later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu(1)
    # Masked before the exponential, which could overflow for j > i.
    return (total[..., :, None] - total[..., None, :]).masked_fill(is_later, -torch.inf).exp()


def decayed_sums(state: Tensor, kept: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """A state before each chunk, `[B, H, n, ...]`, and after the last; each chunk multiplies it by its entry
    of `kept` and adds that of `added`, both `[B, H, n, ...]`."""
    before = []
    # `unbind`, because the gradient of an index is a tensor as large as all chunks together.
    for share, new in zip(kept.unbind(2), added.unbind(2), strict=True):
        before.append(state)
        state = state * share + new
    return torch.stack(before, dim=2), state


def delta_rule_in_chunks(
    v: Tensor,
    rate: Tensor,
    state: Tensor,
    *,
    q_since_start: Tensor,
    k_since_start: Tensor,
    k_to_end: Tensor,
    query_products: Tensor,
    key_products: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """A delta rule with decay; the corrections within a chunk solve one triangular system.

    The decay, of any kind, is already applied to the arguments.

    Args:
        v: `[B, H, n, C, V]`.
        rate: `[B, H, n, C]`, in [0, 1].
        state: `[B, H, K, V]`.
        q_since_start: `[B, H, n, C, K]` queries times the decay from the start of the chunk to the query.
        k_since_start: `[B, H, n, C, K]` keys, likewise.
        k_to_end: `[B, H, n, C, K]` keys times the decay from their token to the end of the chunk.
        query_products: `[B, H, n, C, C]` dot products of queries (rows) and keys (columns), with the decay
            from key to query; 0 for later keys.
        key_products: `[B, H, n, C, C]` dot products of keys, likewise; the diagonal is ignored.
        kept: `[B, H, n, 1 or K, 1]` decay of the state over a whole chunk.

    Returns:
        `[B, H, n, C, V]`, and the state after the last chunk.
    """
    # Each token's write depends on the writes of earlier tokens of the chunk: (I + A) w = rate (v - ...).
    scaled = torch.cat([v, k_since_start], dim=-1) * rate[..., None]
    system = key_products * rate[..., None]
    solved = torch.linalg.solve_triangular(system, scaled, upper=False, unitriangular=True)
    from_values, from_state = solved.split([v.shape[-1], state.shape[-2]], dim=-1)
    states, written = [], []
    # Unbound, as the gradient of each indexing would be a tensor as large as all chunks.
    parts = (from_values, from_state, k_to_end.transpose(-1, -2), kept)
    for value, key, key_at_end, share in zip(*(x.unbind(2) for x in parts), strict=True):
        states.append(state)
        written.append(value - key @ state)
        state = state * share + key_at_end @ written[-1]
    return q_since_start @ torch.stack(states, 2) + query_products @ torch.stack(written, 2), state


def can_use_fla(x: Tensor) -> bool:
    """Whether flash-linear-attention's kernels can run: installed, on a GPU, not in float64."""
    return x.is_cuda and x.dtype != torch.float64 and importlib.util.find_spec("fla") is not None
