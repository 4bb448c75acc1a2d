"""`ovq_attention`: the front door. Checks its arguments, picks a backend, restores the order of rows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ovq.ops import checks
from ovq.ops.chunk import chunk_attention
from ovq.ops.constant_rate import constant_rate_attention
from ovq.ops.decode import decode_step
from ovq.ops.groups import Plan
from ovq.ops.naive import naive_row
from ovq.ops.rows import AlignedRows, Rows
from ovq.ops.rules import Rules
from ovq.ops.state import OVQState, with_capacity
from ovq.ops.triton import refusal

BACKENDS = ("auto", "naive", "torch", "triton")

_used: str | None = None


def backend_used() -> str | None:
    """The backend that ran the last `ovq_attention` call of this process: `"naive"`, `"torch"` or `"triton"`.

    Example:
        >>> x = torch.randn(1, 4, 1, 8)
        >>> _ = ovq_attention(x, x, x, num_slots=4, chunk_size=2)
        >>> backend_used()
        'torch'
    """
    return _used


def ovq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_slots: int,
    chunk_size: int,
    scale: float | Tensor | None = None,
    initial_state: OVQState | None = None,
    output_final_state: bool = False,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    growth: str = "plateau",
    init: str = "novelty",
    merge: str = "existing",
    bias: str = "count",
    rate: float | str = "count",
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> tuple[Tensor, OVQState | None]:
    """Online vector-quantized attention.

    Each query attends by one softmax to the slots of a dictionary learned online from the chunks before its
    own (at most `num_slots` mean keys and values, biased by the log of their counts) and exactly to its own
    chunk up to itself. Time is linear in T, memory constant. q and k are used as they come: the layer
    L2-normalises them.

    Args:
        q: `[B, T, H, K]` queries; float32, float64, bfloat16 or float16.
        k: `[B, T, Hkv, K]` keys; Hkv divides H, and query head h reads key/value head h // (H / Hkv).
        v: `[B, T, Hkv, V]` values; V may differ from K.
        num_slots: N, the bound on the slots of a head.
        chunk_size: C, tokens of a chunk. Part of the model, not a tiling choice: it changes the output.
        scale: factor of the dot products, a float or a (differentiable) tensor `[H]`; None means sqrt(K).
        initial_state: the state of an earlier call to continue from. It is not changed.
        output_final_state: also return the state after the last token.
        attention_mask: `[B, T]` of 0 and 1; the ones of a row are contiguous, the padding is left or right.
            Padding gives zeros, and leaves no trace in the state.
        cu_seqlens: `[rows + 1]` bounds of rows packed into a batch of 1; a state then has that many rows.
        growth: how the dictionary grows with t tokens, `"plateau"` (t N / (t + N)), `"linear"` or
            `"immediate"`.
        init: which keys open slots, the least similar to all slots (`"novelty"`) or a `"random"` choice.
        merge: whether other keys go to the slots that existed before their chunk (`"existing"`) or also to
            those that it opened (`"updated"`).
        bias: what the score of a slot D of count c gets beside scale q.D: log c (`"count"`), or log c -
            scale |D|^2 / 2 (`"count+norm"`, the term that equal norms would cancel). A token of the chunk is
            a slot of count 1.
        rate: how far a slot's means move towards each token merged into it, in order of position: 1 / count
            (`"count"`, the running mean), or a constant share in (0, 1]. Counts add up either way. A constant
            rate cannot be rewound: training keeps every chunk's probabilities, so it is for ablations.
        generator: seeds `init="random"` by its `initial_seed()`; None means PyTorch's default generator.
        backend: `"naive"` (reference loops), `"torch"` (any device), `"triton"` (kernels for GPUs; default
            `init` and `merge`, no float64) or `"auto"`: `"triton"` where it can run on a GPU, else `"torch"`;
            `backend_used()` tells which ran.

    Returns:
        Outputs `[B, T, H, V]` in the dtype of `q`, and the final `OVQState` (None unless asked for).

    Raises:
        ValueError: if an argument does not fit, saying what was expected and what was found.

    Source: arXiv 2602.03922; `docs/math.md` says which choices are this project's.

    Example:
        >>> q, k, v = torch.randn(3, 1, 40, 2, 8).unbind()
        >>> k = torch.nn.functional.normalize(k, dim=-1)
        >>> o, state = ovq_attention(q, k, v, num_slots=16, chunk_size=8, output_final_state=True)
        >>> o.shape, int(state.num_seen), state.keys.shape
        (torch.Size([1, 40, 2, 8]), 40, torch.Size([1, 2, 11, 8]))
        >>> o1, state = ovq_attention(  # one more token
        ...     q[:, :1], k[:, :1], v[:, :1], num_slots=16, chunk_size=8, initial_state=state,
        ...     output_final_state=True,
        ... )
        >>> packed = torch.tensor([0, 16, 40])  # two rows, one after the other
        >>> o2, _ = ovq_attention(q, k, v, num_slots=16, chunk_size=8, cu_seqlens=packed)
        >>> torch.equal(o2[:, :16], o[:, :16])
        True
    """
    checks.check_qkv(q, k, v)
    rules = Rules(
        num_slots=num_slots,
        chunk_size=chunk_size,
        growth=growth,
        init=init,
        merge=merge,
        bias=bias,
        rate=rate,
        seed=_seed(init, generator),
    )
    backend = _resolved(backend, q, v, rules)
    scale = checks.checked_scale(scale, q)
    if (
        torch.compiler.is_compiling()
        and backend == "triton"
        and initial_state is None
        and not output_final_state
    ):
        from ovq.ops.triton.traced import attention

        return attention(q, k, v, scale, attention_mask, cu_seqlens, rules), None
    return _attention(
        q, k, v, scale, initial_state, output_final_state, attention_mask, cu_seqlens, rules, backend
    )


# Not compiled: what a call does depends on lengths and on the state, in plain Python.
@torch.compiler.disable
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    initial_state: OVQState | None,
    output_final_state: bool,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    rules: Rules,
    backend: str,
) -> tuple[Tensor, OVQState | None]:
    """`ovq_attention`, its arguments but those of rows and state checked."""
    rows = checks.checked_rows(q, attention_mask, cu_seqlens)
    if initial_state is None:
        state = OVQState.empty(
            batch_size=len(rows),
            num_kv_heads=k.shape[2],
            key_dim=k.shape[3],
            value_dim=v.shape[3],
            num_slots=rules.num_slots,
            chunk_size=rules.chunk_size,
            dtype=q.dtype,
            device=q.device,
        )
    else:
        checks.check_state(initial_state, len(rows), k, v, rules)
        state = initial_state
    run = {"naive": _run_naive, "torch": _run_torch, "triton": _run_triton}[backend]
    with _full_precision(q.device):
        o, state = run(q, k, v, scale, state, rows, rules, output_final_state)
    return o, state if output_final_state else None


def _seed(init: str, generator: torch.Generator | None) -> int:
    if init != "random":
        return 0
    return torch.initial_seed() if generator is None else generator.initial_seed()


def _resolved(backend: str, q: Tensor, v: Tensor, rules: Rules) -> str:
    """The backend that runs the call; `backend_used` tells it from here on."""
    global _used
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, found {backend!r}")
    if backend == "triton" and (reason := refusal(q, v, rules)):
        raise ValueError(f"backend: 'triton': {reason}")
    if backend == "auto":
        backend = "triton" if q.is_cuda and refusal(q, v, rules) is None else "torch"
    _used = backend
    return backend


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32: autocast or a reduced matmul precision would change the routing."""
    before = torch.get_float32_matmul_precision()
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _run_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    state: OVQState,
    rows: Rows,
    rules: Rules,
    output_final_state: bool,
) -> tuple[Tensor, OVQState | None]:
    """Row by row through the reference."""
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    pieces, states, end = [], [], 0
    for r, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
        part = slice(start, start + length)
        o, after = naive_row(flat_q[part], flat_k[part], flat_v[part], scale, state.select([r]), rules)
        pieces += [o.new_zeros(max(0, start - end), *o.shape[1:]), o]
        end = max(end, start + length)
        states.append(after)
    total = q.shape[0] * q.shape[1]
    pieces.append(q.new_zeros(total - end, q.shape[2], v.shape[3]))
    o = torch.cat(pieces).view(*q.shape[:3], v.shape[3])
    return o, OVQState.concatenate(states) if output_final_state and states else state


def _is_decoding(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, state: OVQState, rows: Rows) -> bool:
    """Whether this is one token a row, without gradients."""
    memory = (state.key_sum, state.value_sum, state.pending_keys, state.pending_values)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, scale, *memory))
    return (
        q.shape[1] == 1 and len(rows) == q.shape[0] and min(rows.lengths, default=0) == 1 and not needs_grad
    )


def _run_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    state: OVQState,
    rows: Rows,
    rules: Rules,
    output_final_state: bool,
) -> tuple[Tensor, OVQState | None]:
    """The kernels, imported only here: neither Triton nor a GPU is needed for anything else."""
    from ovq.ops.triton.attend import chunked
    from ovq.ops.triton.decode import decode_step

    if _is_decoding(q, k, v, scale, state, rows):
        return decode_step(q, k, v, scale, state, rules)
    return chunked(q, k, v, scale, state, rows, rules, output_final_state)


def _run_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    state: OVQState,
    rows: Rows,
    rules: Rules,
    output_final_state: bool,
) -> tuple[Tensor, OVQState | None]:
    """One token a row without gradients goes to the decode path, all else to the chunked one."""
    if _is_decoding(q, k, v, scale, state, rows):
        return decode_step(q, k, v, scale, state, rules)
    total = q.shape[0] * q.shape[1]
    num_pending = state.num_pending.tolist()
    aligned = AlignedRows(rows, pending=num_pending, chunk_size=rules.chunk_size, num_tokens=total)
    if not sum(rows.lengths):
        return q.new_zeros(*q.shape[:3], v.shape[3]), state
    before = state if aligned.order == list(range(len(rows))) else state.select(aligned.order)
    num_merged = (before.num_seen - before.num_pending).tolist()
    plan = Plan.make(
        aligned,
        opened=before.num_open.tolist(),
        num_merged=num_merged,
        num_kv_heads=k.shape[2],
        group_size=q.shape[2] // k.shape[2],
        rules=rules,
    )
    before = with_capacity(before, plan.capacity)
    chunks_k = aligned.align(k, before.pending_keys)
    chunks_v = aligned.align(v, before.pending_values)
    attend = chunk_attention if rules.rate == "count" else constant_rate_attention
    o, key_sum, value_sum, count = attend(
        aligned.align(q, None),
        chunks_k,
        chunks_v,
        scale,
        before.key_sum,
        before.value_sum,
        before.count,
        plan,
    )
    o = aligned.unalign(o, q.shape[0], q.shape[1])
    if not output_final_state:
        return o, None
    after = dataclasses.replace(
        before,
        key_sum=key_sum,
        value_sum=value_sum,
        count=count,
        pending_keys=aligned.tail(chunks_k),
        pending_values=aligned.tail(chunks_v),
        num_seen=torch.tensor(
            [m + n for m, n in zip(num_merged, aligned.lengths, strict=True)], dtype=torch.int64
        ),
        _written=None,
    )
    if before is not state and aligned.order != list(range(len(rows))):
        inverse = [0] * len(rows)
        for place, row in enumerate(aligned.order):
            inverse[row] = place
        after = after.select(inverse)
    return o, after
