"""`ovq_attention`: the entry point. It checks its arguments and hands them to a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ovq.ops import backends, dispatch, operator
from ovq.ops.backends.triton import refusal_of
from ovq.ops.call import Request, RowBounds
from ovq.ops.checks import check_qkv, checked_scale
from ovq.ops.next_step import settings_of
from ovq.ops.options import VALUE_WEIGHT, Options, default_growth
from ovq.ops.random_init import seed_of
from ovq.ops.state import OVQState
from ovq.ops.uncompiled import uncompiled


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
    attention_mask: Tensor | RowBounds | None = None,
    cu_seqlens: Tensor | None = None,
    growth: str | None = None,
    init: str = "novelty",
    merge: str = "existing",
    bias: str = "count",
    rate: float | str = "count",
    value_weight: float = VALUE_WEIGHT,
    token_weights: Tensor | None = None,
    log_forget: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> tuple[Tensor, OVQState | None]:
    """Online vector-quantized attention.

    Each query attends with one softmax to two things: the slots of a dictionary that was learned online from
    the earlier chunks (at most `num_slots` mean keys and values per head, biased by the log of their counts),
    and the tokens of its own chunk up to and including itself. Time is linear in T, memory is constant. q and
    k are used as they are; the layer L2-normalises them.

    Args:
        q: `[B, T, H, K]` queries; float32, float64, bfloat16 or float16.
        k: `[B, T, Hkv, K]` keys; Hkv divides H, and query head h reads key/value head h // (H / Hkv).
        v: `[B, T, Hkv, V]` values; V may differ from K.
        num_slots: N, the largest number of slots per head.
        chunk_size: C, tokens per chunk. Part of the model, not a tiling choice: it changes the output.
        scale: factor of the dot products, a float or a (differentiable) tensor `[H]`; None means sqrt(K).
        initial_state: the state of an earlier call to continue from. It is not changed.
        output_final_state: also return the state after the last token.
        attention_mask: `[B, T]` of 0 and 1; the ones of a row are contiguous, with padding left or right of
            them. The output is zero at padding, and padding does not enter the state. The layers of a model
            pass `RowBounds` instead, which was checked once for all layers.
        cu_seqlens: `[rows + 1]` bounds of rows packed into a batch of 1; a state then has that many rows.
        growth: how the dictionary grows with the number t of tokens: `"plateau"` (t N / (t + N)), `"linear"`
            or `"immediate"` (one slot per token while there is room). None: `"immediate"` where pairs are
            merged (`"ward"`, `"ward-sqrt"`, `"nearest"`), else `"plateau"`.
        init: which keys open slots: those least similar to all slots (`"novelty"`), or a `"random"` choice.
        merge: whether other keys go to the slots that existed before their chunk (`"existing"`, the paper's
            rule) or also to those that the chunk opened (`"updated"`). With `"nearest"`, the tokens of a
            chunk and as many slots, in turn, each look for the slot or token nearest to them, in keys and
            values, and the shortest of these edges are merged, in four parts. `"ward"` merges the cheapest
            pairs of slots and tokens one after the other, and so does `"ward-sqrt"`, with costs in which
            counts matter less: both are theory, and run in `"naive"` alone.
        bias: what is added to the score scale q.D of a slot with mean D and count c: log c (`"count"`), or
            log c - scale |D|^2 / 2 (`"count+norm"`, a term that cancels where all norms are equal). A token
            of the chunk is a slot of count 1.
        rate: how far a slot's means move towards each token merged into it, in order of position: 1 / count
            (`"count"`, the running mean), or a constant share in (0, 1]. Counts add up either way. Steps at a
            constant rate cannot be undone in the backward, so training keeps the probabilities of every
            chunk: this is meant for ablations.
        value_weight: w of the rules that merge pairs: the weight of distances between values, relative to
            their mean squared length, beside those between keys.
        token_weights: `[B, T, Hkv]` numbers of at least 0 (differentiable), what a token counts for in the
            sums and counts of its slot. A slot is read with the log of its total weight in the place of its
            log count. Tokens of the own chunk are read as if their weight were 1. None: 1 throughout.
        log_forget: `[B, T, Hkv]` logs, at most 0 (differentiable), of the factor by which a token multiplies
            the weight of everything before it in its row, tokens of its own chunk included; these then are
            read with their weights too. Below -48 / chunk_size they count as that. None: nothing is
            forgotten.
        generator: seeds `init="random"` by its `initial_seed()`; None means PyTorch's default generator.
        backend: `"naive"` (reference loops), `"torch"` (matrix products, any device), `"cpu"` (compiled for
            this processor; no float64), `"triton"` (kernels for GPUs; no float64, no merge `"updated"`), or
            `"auto"`: the fastest that can run the call; `backend_used()` tells which ran.

    Returns:
        Outputs `[B, T, H, V]` in the dtype of `q`, and the final `OVQState` (None unless asked for).

    Raises:
        ValueError: if an argument does not fit; the message says what was expected and what was found.

    Source: arXiv 2602.03922; `docs/method/math.md` says which choices are this project's.

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
    # What a decode step is told by the state that it continues need not be found out anew.
    is_plain = attention_mask is None and cu_seqlens is None and generator is None
    settings = settings_of(
        num_slots=num_slots,
        chunk_size=chunk_size,
        growth=growth,
        init=init,
        merge=merge,
        bias=bias,
        rate=rate,
        value_weight=value_weight,
        backend=backend,
        scale=Tensor if isinstance(scale, Tensor) else scale,
    )
    has_forgotten = isinstance(initial_state, OVQState) and initial_state.pending_forget is not None
    forgets = log_forget is not None or has_forgotten
    if is_plain and isinstance(initial_state, OVQState) and output_final_state and not forgets:
        found = _next_step(q, k, v, scale, initial_state, token_weights, settings)
        if found is not None:
            return found
    check_qkv(q, k, v)
    options = Options(
        num_slots=num_slots,
        chunk_size=chunk_size,
        growth=default_growth(merge) if growth is None else growth,
        init=init,
        merge=merge,
        bias=bias,
        rate=rate,
        value_weight=value_weight,
        seed=seed_of(init, generator),
    )
    backends.check_name(backend)
    scale = checked_scale(scale, q)
    has_weights = token_weights is not None or log_forget is not None
    is_stateless = initial_state is None and not output_final_state and not has_weights
    if torch.compiler.is_compiling() and is_stateless and _is_traced(backend, q, v, options):
        from ovq.ops.backends.triton.traced import attention

        return attention(q, k, v, scale, attention_mask, cu_seqlens, options), None
    request = Request(
        q=q,
        k=k,
        v=v,
        scale=scale,
        options=options,
        backend=backend,
        initial_state=initial_state,
        output_final_state=output_final_state,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        token_weights=token_weights,
        log_forget=log_forget,
    )
    o, state = _attention_of(options)(request)
    step = None if state is None else state._next
    if is_plain and step is not None and step.settings is None:
        step.settings = settings
    return o, state


def _next_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | Tensor | None,
    state: OVQState,
    token_weights: Tensor | None,
    settings: tuple,
) -> tuple[Tensor, OVQState] | None:
    """The call as a repetition of the decode step before it, if it is one."""
    step = state._next
    if step is None or torch.compiler.is_compiling():
        return None
    if not step.fits(q, k, v, state, token_weights, settings):
        return None
    dispatch.note_backend("cpu")
    scale = checked_scale(scale, q) if isinstance(scale, Tensor) else step.scale
    o, after = step.run(q, k, v, scale, state, token_weights, options=step.options)
    return o, step.told(after)


def _is_traced(backend: str, q: Tensor, v: Tensor, options: Options) -> bool:
    """Whether a call without a state becomes one node of a compiled graph: only if Triton runs it."""
    wants = backend == "triton" or (backend == "auto" and q.is_cuda)
    if not wants or refusal_of(q, v, options):
        return False
    dispatch.note_backend("triton")
    return True


def _attention_of(options: Options) -> Callable[[Request], tuple[Tensor, OVQState | None]]:
    """What runs a call: the backends, or in a graph an operator that does."""
    if not torch.compiler.is_compiling():
        return dispatch.attention
    # A graph would hold the seed that it was made with.
    return _uncompiled if options.init == "random" else operator.attention


_uncompiled = uncompiled(dispatch.attention)
