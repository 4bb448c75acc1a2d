"""Argument checks of the op; errors say what was expected and what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ovq.fields import is_finite
from ovq.ops.call import Call, RowBounds, Rows
from ovq.ops.fading import LEAST_LOG
from ovq.ops.options import Options, rounding_sums, weighing_chunk
from ovq.ops.parts import spec_of
from ovq.ops.state import HEAD_TENSORS, OVQState, forgetting, tensors_of, weighted
from ovq.ops.sums import DTYPES, state_dtype
from ovq.ops.transforms import check_transforms


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices of q, k, v agree."""
    _check_tensors(has_data(q, k, v), q=q, k=k, v=v)
    if k.shape[:2] != q.shape[:2] or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "q, k, v: expected [B, T, H, K], [B, T, Hkv, K], [B, T, Hkv, V], found "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k: expected head dimension {q.shape[3]} as q has, found {k.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q: expected a number of heads divisible by the {k.shape[2]} key/value heads, found {q.shape[2]}"
        )


def check_kv(k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless shapes, dtypes and devices of k and v agree."""
    _check_tensors(True, k=k, v=v)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"k, v: expected [B, T, Hkv, K], [B, T, Hkv, V], found {tuple(k.shape)}, {tuple(v.shape)}"
        )


def _check_tensors(needs_data: bool, /, **tensors: Tensor) -> None:
    """Raise ValueError unless these are tensors `[B, T, heads, dim]` of one dtype and device."""
    if not torch.compiler.is_compiling():
        check_transforms()
    first: tuple[str, Tensor] | None = None
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a tensor, found {type(x).__name__}")
        check_dense(name, x, needs_data=needs_data)
        if x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions [B, T, heads, dim], found {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name}: expected a dtype of {DTYPES}, found {x.dtype}")
        known, other = first = first or (name, x)
        if x.dtype != other.dtype or x.device != other.device:
            expected = f"{other.dtype} on {other.device} as {known} is"
            raise ValueError(f"{name}: expected {expected}, found {x.dtype} on {x.device}")
        if min(x.shape[2:]) < 1:
            raise ValueError(f"{name}: expected at least one head and one dimension, found {tuple(x.shape)}")


def has_data(*tensors: Any) -> bool:
    """Whether any of the tensors has values, and not only a shape, as meta and fake ones.

    Graphs are traced with fake tensors, so under `torch.compile` all count as having some.
    """
    # The class is asked first because `is_fake` takes microseconds.
    return torch.compiler.is_compiling() or any(
        not isinstance(x, Tensor) or not (x.is_meta or (type(x) is not Tensor and is_fake(x)))
        for x in tensors
    )


def is_memory(x: Tensor) -> bool:
    """Whether a tensor is what lies in memory, as kernels read it.

    A subclass may wrap other tensors or hold no data, and PyTorch may negate numbers as they are read.
    """
    is_plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    # A graph cannot ask, and has no kernels.
    return is_plain and (torch.compiler.is_compiling() or not x.is_neg())


def check_dense(name: str, x: Tensor, *, needs_data: bool = True) -> None:
    """Raise ValueError, naming the tensor, unless it is a dense one, with data if that is needed."""
    lacks_data = needs_data and not has_data(x)
    if x.layout != torch.strided or x.is_nested or lacks_data:
        found = "a fake one" if lacks_data and not x.is_meta else f"{x.layout} on {x.device}"
        found = "a nested one" if x.is_nested else found
        raise ValueError(f"{name}: expected a dense tensor with data, found {found}")


def checked_scale(scale: float | Tensor | None, q: Tensor) -> Tensor:
    """`scale` as a tensor `[H]` in the dtype of the sums."""
    num_heads, wide = q.shape[2], state_dtype(q.dtype)
    if scale is None:
        scale = q.shape[3] ** 0.5
    if isinstance(scale, Tensor):
        if scale.shape != (num_heads,):
            raise ValueError(
                f"scale: expected a finite float or a tensor [{num_heads}], found {tuple(scale.shape)}"
            )
        if not scale.is_floating_point():
            raise ValueError(f"scale: expected a floating dtype, found {scale.dtype}")
        check_dense("scale", scale, needs_data=has_data(q))
        return scale.to(q.device, wide)
    is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool) and is_finite(scale)
    if not is_number or abs(scale) > torch.finfo(wide).max:
        raise ValueError(f"scale: expected a finite float or a tensor [{num_heads}], found {scale!r}")
    return q.new_full((num_heads,), float(scale), dtype=wide)


def checked_call(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    options: Options,
    initial_state: OVQState | None = None,
    wants_state: bool = False,
    attention_mask: Tensor | RowBounds | None = None,
    cu_seqlens: Tensor | None = None,
    token_weights: Tensor | None = None,
    log_forget: Tensor | None = None,
) -> Call:
    """The `Call` for tensors, scale and options that are already checked; checks rows, gates and state.

    It cannot run while `torch.compile` traces (see `operator.py`); the other checks can.
    """
    rows = checked_rows(q, attention_mask, cu_seqlens)
    for name, given in (("token_weights", token_weights), ("log_forget", log_forget)):
        if given is not None and options.ablation.rate != "count":
            raise ValueError(f"{name}: expected none with a constant rate, found some")
    state = _checked_state(initial_state, len(rows), k, v, options)
    if token_weights is not None:
        token_weights = _checked_numbers("token_weights", token_weights, k, rows, state_dtype(k.dtype))
        state = weighted(state)
    elif state.weight is not None:
        token_weights = torch.ones(k.shape[:3], dtype=state.weight.dtype, device=k.device)
    if log_forget is not None:
        log_forget = _checked_numbers("log_forget", log_forget, k, rows, torch.float64)
        log_forget = log_forget.clamp(min=LEAST_LOG / options.chunk_size)
    elif state.pending_forget is not None:
        log_forget = torch.zeros(k.shape[:3], dtype=torch.float64, device=k.device)
    if log_forget is not None:
        state, options = forgetting(state), weighing_chunk(options)
        if token_weights is None:
            token_weights = torch.ones_like(log_forget, dtype=state.wide)
    # Last, as in `PreparedStep.continues`: equal options are the same object only in the same order.
    options = rounding_sums(options, state.state_dtype)
    call = Call(
        q=q,
        k=k,
        v=v,
        scale=scale,
        state=state,
        rows=rows,
        options=options,
        wants_state=wants_state,
        token_weights=token_weights,
        log_forget=log_forget,
    )
    if options.state_dtype != "float32":
        expected = "expected sums in float32 (state_dtype)"
        if options.ablation.rate != "count":
            raise ValueError(f"rate: {expected}, found {options.state_dtype}")
        if call.wants_gradients:
            raise ValueError(f"gradients: {expected} or torch.no_grad(), found {options.state_dtype}")
    return call


def _checked_state(state: OVQState | None, num_rows: int, k: Tensor, v: Tensor, options: Options) -> OVQState:
    """The initial state of a call after its checks: an empty one if none is given."""
    if state is not None:
        check_state(state, num_rows, k, v, options)
        return state
    empty = OVQState.empty(
        batch_size=num_rows,
        num_kv_heads=k.shape[2],
        key_dim=k.shape[3],
        value_dim=v.shape[3],
        num_slots=options.num_slots,
        chunk_size=1,
        dtype=k.dtype,
        device=k.device,
    )
    # No token is pending, and zeros for a chunk would take longer than a short call.
    size = options.chunk_size
    return dataclasses.replace(
        empty,
        chunk_size=size,
        pending_keys=empty.pending_keys.expand(-1, -1, size, -1),
        pending_values=empty.pending_values.expand(-1, -1, size, -1),
    )


# Requirements on the per-token gates.
_NUMBERS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "token_weights": ("finite numbers of at least 0", lambda x: x.isfinite() & (x >= 0)),
    "log_forget": ("numbers of at most 0", lambda x: x <= 0),
}


def _checked_numbers(name: str, x: Tensor, k: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Gate `name` `[B, T, Hkv]` converted to `dtype`; invalid numbers at padding are set to 0."""
    expected, is_right = _NUMBERS[name]
    shape = tuple(k.shape[:3])
    if not isinstance(x, Tensor) or tuple(x.shape) != shape:
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a tensor {list(shape)} as k has, found {found}")
    if not x.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, found {x.dtype}")
    check_dense(name, x)
    x = x.to(k.device, dtype)
    is_wrong = ~is_right(x.detach())
    if not bool(is_wrong.any()):
        return x
    flat, of_flat = x.detach().flatten(0, 1), is_wrong.flatten(0, 1)
    for start, length in zip(rows.starts, rows.lengths, strict=True):
        row = slice(start, start + length)
        for wrong in flat[row][of_flat[row]].tolist():
            raise ValueError(f"{name}: expected {expected}, found {wrong}")
    return x.masked_fill(is_wrong, 0)


def checked_rows(q: Tensor, attention_mask: Tensor | RowBounds | None, cu_seqlens: Tensor | None) -> Rows:
    """Range of each row's tokens in the flattened `[B * T]` input."""
    batch, length = q.shape[:2]
    if attention_mask is None and cu_seqlens is None:
        return Rows(tuple(range(0, batch * length, length)) if length else (0,) * batch, (length,) * batch)
    if isinstance(attention_mask, RowBounds) and cu_seqlens is None:
        return Rows.of(attention_mask.bounds)
    return Rows.of(found_bounds(attention_mask, cu_seqlens, batch, 0, length))


def row_bounds(
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, batch_size: int, num_past: int, num_new: int
) -> Tensor:
    """`RowBounds.bounds` of the new columns of a call; an operator if traced or without data.

    Args:
        attention_mask: `[B, P + T]` over cached and new columns, the ones of each row contiguous; or None.
        cu_seqlens: `[R + 1]` offsets of packed rows; or None.
        batch_size: B.
        num_past: P.
        num_new: T.

    Raises:
        ValueError: if the mask or the offsets are invalid; under `torch.compile`, when the graph runs.

    Example:
        >>> row_bounds(torch.tensor([[0, 1, 1, 1]]), None, 1, 2, 2)
        tensor([[0],
                [2]])
    """
    is_known = has_data(attention_mask if cu_seqlens is None else cu_seqlens)
    is_operator = torch.compiler.is_compiling() or not is_known
    find = torch.ops.ovq.row_bounds if is_operator else found_bounds
    return find(attention_mask, cu_seqlens, batch_size, num_past, num_new)


def found_bounds(
    attention_mask: Any, cu_seqlens: Tensor | None, batch_size: int, num_past: int, num_new: int
) -> Tensor:
    """`row_bounds` without `torch.compile`."""
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask, cu_seqlens: expected at most one of them, found both")
    if cu_seqlens is not None:
        return packed_bounds(batch_size, num_new, cu_seqlens)
    expected, is_tensor = [batch_size, num_past + num_new], isinstance(attention_mask, Tensor)
    if not is_tensor or list(attention_mask.shape) != expected:
        found = tuple(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        raise ValueError(f"attention_mask: expected a tensor {expected} of 0 and 1, found {found}")
    check_dense("attention_mask", attention_mask)
    return masked_bounds(checked_mask(attention_mask)[:, num_past:])


def _fake_bounds(
    attention_mask: Tensor | None, cu_seqlens: Tensor | None, batch_size: int, num_past: int, num_new: int
) -> Tensor:
    given = attention_mask if cu_seqlens is None else cu_seqlens
    num_rows = batch_size if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # On the meta device not a real tensor, whose numbers calls with data would read.
    device = "meta" if given is not None and given.is_meta else "cpu"
    return torch.empty(2, num_rows, dtype=torch.int64, device=device)


# Not `torch.library.custom_op`, which loads the compiler.
_LIBRARY = torch.library.Library("ovq", "FRAGMENT")
_LIBRARY.define(
    "row_bounds(Tensor? attention_mask, Tensor? cu_seqlens, "
    "SymInt batch_size, SymInt num_past, SymInt num_new) -> Tensor"
)
_LIBRARY.impl("row_bounds", found_bounds, "CompositeExplicitAutograd")
torch.library.register_fake("ovq::row_bounds", _fake_bounds, lib=_LIBRARY)


def packed_bounds(batch: int, length: int, cu_seqlens: Tensor) -> Tensor:
    """`RowBounds.bounds` of rows packed into `length` tokens; ValueError if the offsets are invalid."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        found = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise ValueError(f"cu_seqlens: expected an int32 or int64 tensor, found {found}")
    check_dense("cu_seqlens", cu_seqlens)
    if batch != 1:
        raise ValueError(f"cu_seqlens: expected packed rows in a batch of 1, found a batch of {batch}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: expected shape [rows + 1], found {tuple(cu_seqlens.shape)}")
    bounds = cu_seqlens.to("cpu", torch.int64)
    lengths = bounds.diff()
    if bounds[0] != 0 or bounds[-1] != length or lengths.min() < 0:
        raise ValueError(
            f"cu_seqlens: expected bounds that rise from 0 to {length}, found {bounds[:16].tolist()}"
        )
    return torch.stack([bounds[:-1], lengths])


def checked_mask(attention_mask: Tensor) -> Tensor:
    """Mask `[B, T]` as bool on the CPU; ValueError unless the ones of each row are contiguous."""
    mask = attention_mask.to("cpu")
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(f"attention_mask: expected 0 and 1 only, found {mask.unique()[:8].tolist()}")
    mask = mask != 0
    is_start = mask.clone()
    is_start[:, 1:] &= ~mask[:, :-1]
    has_hole = is_start.sum(-1) > 1
    if bool(has_hole.any()):
        row = int(has_hole.nonzero()[0])
        raise ValueError(
            f"attention_mask: expected the real tokens of a row to be contiguous, found a hole in row {row}"
        )
    return mask


def masked_bounds(mask: Tensor) -> Tensor:
    """`RowBounds.bounds` of a mask `[B, T]` that `checked_mask` returned."""
    batch, length = mask.shape
    first = mask.int().argmax(-1) if length else mask.new_zeros(batch, dtype=torch.int64)
    return torch.stack([torch.arange(batch, device=mask.device) * length + first, mask.sum(-1)])


def check_state(state: OVQState, num_rows: int, k: Tensor, v: Tensor, options: Options) -> None:
    """Raise ValueError unless a call with these keys, values and options can continue `state`."""
    if not isinstance(state, OVQState):
        raise ValueError(f"initial_state: expected an OVQState, found {type(state).__name__}")
    for name, dims in (("count", 3), ("key_sum", 4), ("value_sum", 4), ("pending_keys", 4)):
        x = getattr(state, name)
        if not isinstance(x, Tensor) or x.dim() != dims:
            what = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"initial_state: {name}: expected a tensor of {dims} dimensions, found {what}")
    # Any format fits any inputs.
    sums = state_dtype(k.dtype) if state.state_dtype == "float32" else state.key_sum.dtype
    for what, expected, found in (
        ("rows", num_rows, state.batch_size),
        ("num_slots", options.num_slots, state.num_slots),
        ("chunk_size", options.chunk_size, state.chunk_size),
        ("window", None, state.window),
        ("num_sinks", 0, state.num_sinks),
        ("key/value heads", k.shape[2], state.count.shape[1]),
        ("key dimension", k.shape[3], state.key_sum.shape[3]),
        ("value dimension", v.shape[3], state.value_sum.shape[3]),
        ("dtype of sums", sums, state.key_sum.dtype),
        ("dtype of pending tokens", k.dtype, state.pending_keys.dtype),
        ("device", k.device, state.key_sum.device),
        ("tensors with data", has_data(k), all(map(has_data, tensors_of(state).values()))),
    ):
        if found != expected:
            raise ValueError(f"initial_state: {what}: expected {expected}, found {found}")
    _check_parts(state, k.dtype)


def _check_parts(state: OVQState, dtype: torch.dtype) -> None:
    """Raise ValueError unless the shapes, dtypes and devices of a state's tensors are consistent.

    Users can construct states, and compiled kernels would read beyond the end of a tensor that is too small.
    """
    if state.weight is None:
        for name in ("pending_weights", "pending_forget"):
            if getattr(state, name) is not None:
                raise ValueError(f"initial_state: {name}: expected none without weight, found some")
    for name in HEAD_TENSORS:
        if getattr(state, name) is not None:
            raise ValueError(f"initial_state: {name}: expected none outside of converted models, found some")
    for name in ("key_step", "value_step"):
        if state.state_dtype != "int8" and getattr(state, name) is not None:
            raise ValueError(f"initial_state: {name}: expected none without sums in int8, found some")
    for name, (shape, kind) in spec_of(tensors_of(state), state.chunk_size, dtype).items():
        x = getattr(state, name)
        place = torch.device("cpu") if name == "num_seen" else state.count.device
        if not isinstance(x, Tensor) or (x.shape, x.dtype, x.device) != (shape, kind, place):
            is_tensor = isinstance(x, Tensor)
            found = f"{list(x.shape)} in {x.dtype} on {x.device}" if is_tensor else type(x).__name__
            raise ValueError(
                f"initial_state: {name}: expected {list(shape)} in {kind} on {place}, found {found}"
            )
    # The place of the next token among those that are pending depends on it. Graphs know no numbers.
    is_known = has_data(state.num_seen) and not torch.compiler.is_compiling()
    if is_known and bool((state.num_seen < 0).any()):
        raise ValueError(f"initial_state: num_seen: expected at least 0, found {state.num_seen.tolist()}")
