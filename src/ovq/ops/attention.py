"""`ovq_attention`: the entry point of the op. It checks its arguments and calls a backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ovq.ops import backends, dispatch, operator
from ovq.ops.ablation import Ablation, with_earlier_names
from ovq.ops.call import RowBounds
from ovq.ops.checks import check_qkv, checked_call, checked_scale, has_data, is_memory
from ovq.ops.options import VALUE_WEIGHT, options_of
from ovq.ops.random_init import seed_of
from ovq.ops.state import OVQState, advanced
from ovq.ops.transforms import is_differentiated
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
    value_weight: float = VALUE_WEIGHT,
    token_weights: Tensor | None = None,
    log_forget: Tensor | None = None,
    generator: torch.Generator | None = None,
    ablation: Ablation | Mapping[str, Any] | None = None,
    backend: str = "auto",
    **earlier_names: Any,
) -> tuple[Tensor, OVQState | None]:
    """Online vector-quantized attention.

    Each query attends, with one softmax, to the slots of a dictionary learned online from earlier chunks (at
    most `num_slots` mean keys and values per head, biased by the log of their counts) and to the tokens of
    its own chunk up to and including itself. Time is linear in T; the state has constant size. q and k are
    not normalised here; the layer L2-normalises them. For meta and fake tensors, results have shapes alone,
    those of `torch.compile`.

    Args:
        q: `[B, T, H, K]` queries; float32, float64, bfloat16 or float16.
        k: `[B, T, Hkv, K]` keys; Hkv divides H, and query head h reads key/value head h // (H / Hkv).
        v: `[B, T, Hkv, V]` values; V may differ from K.
        num_slots: N, the maximum number of slots per head.
        chunk_size: C, tokens per chunk. Part of the model, not a tiling choice: it changes the output.
        scale: factor of the dot products, a float or a (differentiable) tensor `[H]`; None means sqrt(K).
        initial_state: the state of an earlier call to continue from. It is not changed.
        output_final_state: whether to also return the state after the last token.
        attention_mask: `[B, T]` of 0 and 1; the ones of a row must be contiguous, with padding left or right
            of them. Outputs at padding are zero, and padding does not enter the state. The layers of a model
            pass `RowBounds` instead, checked once for all layers.
        cu_seqlens: `[rows + 1]` offsets of rows packed into a batch of 1; states then have `rows` rows.
        growth: schedule of the number of slots after t tokens: `"plateau"` (t N / (t + N)), `"linear"`
            (t / 2) or `"immediate"` (one slot per token while there is room). None: `"immediate"` for rules
            that merge pairs (`"ward"`, `"ward-sqrt"`, `"nearest"`), else `"plateau"`.
        init: which keys open slots: the least similar to all slots (`"novelty"`), or a `"random"` choice.
        merge: update rule of the dictionary. `"existing"`, the paper's rule: the other keys merge into slots
            that existed before their chunk. `"updated"`: they may also merge into slots that the chunk
            opened. `"nearest"`: the tokens of a chunk and up to C slots, in rotation, each have an edge to
            the slot or token nearest in keys and values; the shortest edges are merged, in four parts.
            `"ward"`: greedy merging of the cheapest pair of slots or tokens; `"ward-sqrt"`: likewise, with
            costs in which counts matter less. Both are of theoretical interest and run only in `"naive"`.
        value_weight: w, the weight of values relative to keys in the distances of the rules that merge
            pairs; values are measured relative to their root mean square length.
        token_weights: `[B, T, Hkv]` weights of at least 0 (differentiable): how often a token counts in the
            sums and the weight of its slot. A slot is read with the log of its total weight instead of its
            log count. A token's own chunk is read as if all weights were 1. None: all weights are 1.
        log_forget: `[B, T, Hkv]` log forget gates, at most 0 (differentiable): each token multiplies the
            weight of everything before it in its row by exp(log_forget), tokens of its own chunk included,
            which then are read with their weights too. Clamped at -48 / chunk_size. Training keeps a
            dictionary per chunk, N T / C slots per head. None: no forgetting.
        generator: its `initial_seed()` seeds `init="random"`; None means PyTorch's default generator.
        ablation: changes for ablations, an `ovq.ops.options.Ablation` or its values by name.
        backend: `"naive"` (reference loops), `"torch"` (matrix products, any device), `"cpu"` (compiled for
            this processor), `"triton"` (GPU kernels), or `"auto"`, the fastest that can run the call.
            `"cpu"` and `"triton"` support neither float64 nor the ablations (`ablation`, `init="random"`,
            `merge="updated"`), and `"cpu"` no `TorchDispatchMode`, which would not see it; `"auto"` then runs
            `"torch"`. Under transforms of `torch.func` and forward-mode differentiation only `"naive"` runs,
            and `"auto"` warns once; under `torch.func.vmap` none does. `backend_used()` tells which one ran.
        earlier_names: `bias` and `rate` of version 0.2, now part of `ablation`.

    Returns:
        Outputs `[B, T, H, V]` in the dtype of `q`, and the final `OVQState` (None unless requested).

    Raises:
        ValueError: if an argument is invalid; the message says what was expected and what was found.

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
    options = options_of(
        num_slots=num_slots,
        chunk_size=chunk_size,
        growth=growth,
        init=init,
        merge=merge,
        ablation=with_earlier_names(ablation, earlier_names, ovq_attention),
        value_weight=value_weight,
        seed=seed_of(init, generator),
    )
    if backend not in backends.NAMES:
        raise ValueError(f"backend: expected one of {backends.NAMES}, found {backend!r}")
    is_dense = attention_mask is None and cu_seqlens is None and log_forget is None
    if is_dense and output_final_state and isinstance(initial_state, OVQState):
        step = initial_state._step
        is_asked_for = step is not None and backend in ("auto", step.backend)
        fits = is_asked_for and step.fits(q, k, v, token_weights, initial_state, options)
        if fits and is_memory(per_head := checked_scale(scale, q)):
            dispatch.note_backend(step.backend)
            after = advanced(initial_state)
            return step.run(q, k, v, per_head, token_weights, initial_state.num_seen, after)
    check_qkv(q, k, v)
    given: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "scale": checked_scale(scale, q),
        "options": options,
        "initial_state": initial_state,
        "wants_state": output_final_state,
        "attention_mask": attention_mask,
        "cu_seqlens": cu_seqlens,
        "token_weights": token_weights,
        "log_forget": log_forget,
    }
    if torch.compiler.is_compiling() or not has_data(q):
        narrow = isinstance(initial_state, OVQState) and initial_state.state_dtype != "float32"
        if options.init == "random" or narrow or is_differentiated():
            # A compiled graph would keep the seed it was traced with, and passes no scales of sums and no
            # derivatives of `torch.func`.
            return _uncompiled(given, backend)
        return operator.attention(**given, backend=backend)
    call = checked_call(**given)
    o, state = dispatch.run_of(call, backend)(call)
    return o, state if output_final_state else None


@uncompiled
def _uncompiled(given: dict[str, Any], backend: str) -> tuple[Tensor, OVQState | None]:
    if torch.compiler.is_exporting() or not has_data(given["q"]):
        raise ValueError(
            "expected no init='random', narrow slots or tangents without data or under torch.export, found "
            "some: torch.compile can do it"
        )
    call = checked_call(**given)
    o, state = dispatch.run_of(call, backend)(call)
    return o, state if call.wants_state else None
