"""MesaNet (von Oswald et al. 2025, arXiv 2506.05233): queries answered by a ridge regression on the past."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovq.fields import ConfigField
from ovq.layers.cache import LayerCache
from ovq.layers.chunked import can_use_fla, decay_between, decayed_sums, from_chunks, to_chunks
from ovq.layers.common import OwnWeights, l2_normalize, without_autocast
from ovq.layers.constant import ConstantStateMixer, sum_dtype
from ovq.layers.heads import HeadsMixer
from ovq.layers.layout import SequenceLayout
from ovq.layers.memory import StateSpec
from ovq.ops.first_order import first_order
from ovq.ops.transforms import needs_operations, refused_transform
from ovq_lab.mixers.norms import WideRMSNorm

STEPS = 30

# Tokens per chunk, within which all pairs are multiplied. A tiling choice.
CHUNK = 32

# As published: the lower bound of the ridge, which bounds the condition number of each system, and the ridge
# before training.
LEAST_RIDGE = 0.25
FIRST_RIDGE = 1.0


class MesaNet(ConstantStateMixer, HeadsMixer, OwnWeights):
    """Ridge regression of past values on past keys; the output is its prediction at the query.

    `M_t = a_t M_{t-1} + b_t k_t k_t^T`, `S_t = a_t S_{t-1} + b_t k_t v_t^T` and
    `o_t = S_t^T (M_t + diag(ridge))^{-1} q_t`, with decay `a_t` and weight `b_t` in (0, 1) computed from the
    token and a ridge learned per component of each query head. The system is solved by conjugate gradients.

    Args:
        mesa_steps: most steps of the conjugate gradients.
        args: those of `HeadsMixer`; there is a state per key/value head.
        kwargs: likewise.

    Raises:
        ValueError: sizes that do not fit each other.

    Example:
        >>> layer = MesaNet(32, num_heads=2)
        >>> _, _, cache = layer(torch.randn(1, 20, 32), use_cache=True)
        >>> {name: list(t.shape) for name, t in cache.layers[0].state.items()}
        {'key_key': [1, 2, 16, 16], 'key_value': [1, 2, 16, 16]}
    """

    state_kind = "the matrices of MesaNet"
    config_fields = HeadsMixer.config_fields | {
        "mesa_steps": ConfigField(
            int, STEPS, "most steps of conjugate gradients that solve its systems", at_least=1
        ),
    }

    def __init__(self, *args: Any, mesa_steps: int = STEPS, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if mesa_steps < 1:
            raise ValueError(f"mesa_steps: expected at least 1, found {mesa_steps}")
        self.num_steps = mesa_steps
        # Projects to the decay and the weight of each token.
        self.gate_proj = nn.Linear(self.hidden_size, 2 * self.num_kv_heads)
        # Its name keeps it out of weight decay in transformers' Trainer.
        self.ridge_bias = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.out_norm = WideRMSNorm(self.head_dim, eps=1e-5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the ridge to 1."""
        nn.init.constant_(self.ridge_bias, math.log(math.expm1(FIRST_RIDGE - LEAST_RIDGE)))

    def constant_spec(self, dtype: torch.dtype) -> StateSpec:
        """Sums of products of keys with keys, and of keys with values, of each head."""
        matrices = ((self.num_kv_heads, self.head_dim, self.head_dim), sum_dtype(dtype))
        return {"key_key": matrices, "key_value": matrices}

    def mix(
        self,
        channels: Tensor,
        hidden_states: Tensor,
        layout: SequenceLayout,
        cache: LayerCache | None,
        **options: Any,
    ) -> Tensor:
        """See `Mixer.mix`."""
        rows = layout.rows()
        q, k, v = self.split_heads(channels)
        q, k = l2_normalize(F.silu(q)), l2_normalize(F.silu(k))
        decay, weight = self.gate_proj(hidden_states).to(q.dtype).chunk(2, dim=-1)
        # Positions without a token are zeros, which neither decay the sums nor add to them.
        inputs = (q, k, v.to(q.dtype), F.logsigmoid(decay), weight.sigmoid())
        q, k, wide_v, log_decay, weight = (rows.take(x) for x in inputs)
        ridge = F.softplus(self.ridge_bias.to(q.dtype)) + LEAST_RIDGE
        before = self.state_before(cache, q.shape[0], channels)
        regression = _ridge_regression_of_fla if can_use_fla(q) else ridge_regression
        with without_autocast(q):
            o, state = regression(q, k, wide_v, log_decay, weight, ridge, before, self.num_steps)
        if cache is not None:
            cache.set_state(state, layout.num_new)
        return self.out_norm(rows.put(o)).flatten(2).to(channels.dtype)


def ridge_regression(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    ridge: Tensor,
    state: dict[str, Tensor],
    num_steps: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recurrence of `MesaNet`, in chunks: no matrix of a single token is formed.

    Gradients are those of the exact solution of each system (implicit differentiation): the backward pass
    solves a second system, and nothing is stored of the steps.

    Args:
        q: `[B, T, H, K]`, normalised.
        k: `[B, T, Hkv, K]`, normalised.
        v: `[B, T, Hkv, K]`.
        log_decay: `[B, T, Hkv]`, at most 0.
        weight: `[B, T, Hkv]`, at least 0.
        ridge: `[H, K]`, above 0.
        state: `"key_key"` and `"key_value"`, `[B, Hkv, K, K]` each.
        num_steps: most steps of the conjugate gradients.

    Returns:
        `[B, T, H, K]`, and the state after the last token.
    """
    num_tokens, head_dim = q.shape[1], q.shape[-1]
    num_kv_heads = k.shape[2]
    chunk = min(CHUNK, num_tokens)
    q, k, v, log_decay, weight = (to_chunks(x, chunk) for x in (q, k, v, log_decay, weight))
    # Each step multiplies by the keys twice, and would copy them each time if they were not contiguous.
    k = k.contiguous()
    total = log_decay.cumsum(-1)
    to_end = ((total[..., -1:] - total).exp() * weight)[..., None]
    added = k.transpose(-1, -2) @ (torch.cat([k, v], dim=-1) * to_end)
    kept = total[..., -1, None, None].exp()
    before, sums = decayed_sums(torch.cat([state["key_key"], state["key_value"]], dim=-1), kept, added)
    old_key_key, old_key_value = before.split(head_dim, dim=-1)

    # [B, Hkv, n, G C, *] from here on: the tokens of a chunk for each of the G query heads of a state.
    num_groups = q.shape[1] // num_kv_heads
    q = q.unflatten(1, (num_kv_heads, num_groups)).movedim(2, 3).flatten(3, 4)
    since_start = total.exp()[..., None].repeat(1, 1, 1, num_groups, 1)
    between = (decay_between(total) * weight[..., None, :]).repeat(1, 1, 1, num_groups, 1)
    ridges = ridge.unflatten(0, (num_kv_heads, 1, num_groups)).repeat_interleave(chunk, dim=2)

    matrix = (since_start, between, k, old_key_key, ridges)
    with torch.no_grad():
        solved = conjugate_gradients(lambda x: _matrix_times(x, *matrix), q, num_steps)
    if torch.is_grad_enabled():
        if (reason := refused_transform(is_plain=False)) is not None:
            raise ValueError(f"mesanet: {reason}")
        solved = _Solution.apply(q - _matrix_times(solved, *matrix), solved, num_steps, *matrix)
    o = _sums_times(solved, since_start, between, k, v, old_key_value)
    o = o.unflatten(3, (num_groups, chunk)).movedim(3, 2).flatten(1, 2)
    # Copies, because views would keep each other alive.
    key_key, key_value = (x.clone() for x in sums.split(head_dim, dim=-1))
    return from_chunks(o, num_tokens), {"key_key": key_key, "key_value": key_value}


def _sums_times(
    x: Tensor, since_start: Tensor, between: Tensor, k: Tensor, other: Tensor, before: Tensor
) -> Tensor:
    """`(sum_{j<=t} w_tj k_j other_j^T)^T x_t` for all tokens t.

    Args:
        x: `[B, Hkv, n, R, K]`.
        since_start: `[B, Hkv, n, R, 1]`, decay from the start of the chunk to token t.
        between: `[B, Hkv, n, R, C]`, weights w_tj of the tokens of the chunk.
        k: `[B, Hkv, n, C, K]`.
        other: `[B, Hkv, n, C, V]`.
        before: `[B, Hkv, n, K, V]`, the sum before each chunk.

    Returns:
        `[B, Hkv, n, R, V]`.
    """
    return (x * since_start) @ before + (x @ k.transpose(-1, -2) * between) @ other


def _matrix_times(
    x: Tensor, since_start: Tensor, between: Tensor, k: Tensor, before: Tensor, ridges: Tensor
) -> Tensor:
    """`(M_t + diag(ridge)) x_t` for all tokens; `ridges` `[Hkv, 1, R, K]`, else as in `_sums_times`."""
    return _sums_times(x, since_start, between, k, k, before) + ridges * x


class _Solution(torch.autograd.Function):
    """The solution x of `A x = q` as a function of the residual `q - A x`.

    The residual is about zero, but carries the gradient: as A is symmetric, its gradient is `A^{-1}` times
    that of x. From there autograd continues through the residual to q and A.
    """

    @staticmethod
    def forward(ctx: Any, residual: Tensor, solved: Tensor, num_steps: int, *matrix: Tensor) -> Tensor:
        ctx.num_steps = num_steps
        ctx.save_for_backward(*matrix)
        return solved.clone()

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        matrix = ctx.saved_tensors
        with without_autocast(upstream):
            found = conjugate_gradients(lambda x: _matrix_times(x, *matrix), upstream, ctx.num_steps)
        return found, None, None, *(None for _ in matrix)


def conjugate_gradients(times: Callable[[Tensor], Tensor], b: Tensor, num_steps: int) -> Tensor:
    """Solve `A x = b` for symmetric positive definite A, independently along the last dimension of b.

    On a CPU it stops once all residuals are below rounding: further steps would not bring x nearer, and be
    slow, as they compute denormal numbers.

    Args:
        times: maps `x` to `A x`.
        b: `[..., K]`. Where it is zero, so is the solution.
        num_steps: most steps; K suffice but for rounding, fewer if A is well conditioned.

    Returns:
        `[..., K]`.
    """
    number = torch.finfo(b.dtype)
    x, residual, direction = torch.zeros_like(b), b.clone(), b
    size = residual.square().sum(-1, keepdim=True)
    # Below inf, so that what overflows is not taken for solved.
    solved_size = (size * number.eps**2).clamp_max(number.max)
    can_stop = b.device.type == "cpu" and not torch.compiler.is_compiling() and not needs_operations()
    for _ in range(num_steps):
        if can_stop and (size <= solved_size).all():
            break
        image = times(direction)
        # Bounds avoid 0 / 0 once a system is solved.
        step = size / (direction * image).sum(-1, keepdim=True).clamp_min(number.tiny)
        x.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1)
        last, size = size, residual.square().sum(-1, keepdim=True)
        direction = torch.addcmul(residual, size / last.clamp_min(number.tiny), direction)
    return x


def _ridge_regression_of_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    weight: Tensor,
    ridge: Tensor,
    state: dict[str, Tensor],
    num_steps: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`ridge_regression` computed by the kernels of flash-linear-attention, with a state per query head."""
    from fla.ops.mesa_net import chunk_mesa_net

    num_groups = q.shape[2] // k.shape[2]
    k, v, log_decay, weight = (x.repeat_interleave(num_groups, dim=2) for x in (k, v, log_decay, weight))
    before = {name: x.repeat_interleave(num_groups, dim=1) for name, x in state.items()}
    o, key_key, key_value = chunk_mesa_net(
        q,
        k,
        v,
        g=log_decay,
        beta=weight,
        lamb=ridge,
        h_kk_init=before["key_key"],
        h_kv_init=before["key_value"],
        output_final_state=True,
        max_CG_iteration=num_steps,
    )
    return o, {"key_key": key_key[:, ::num_groups], "key_value": key_value[:, ::num_groups]}
