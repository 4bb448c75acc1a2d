"""Specification of the tensors of a state (shapes, dtypes), used to create, check and send states."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ovq.ops.narrow import state_dtype_of
from ovq.ops.sums import state_dtype as wide_dtype

#: Shape and dtype of each tensor of a state, by name.
StateSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]


def slot_spec(
    num_slots: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    chunk_size: int,
    dtype: torch.dtype,
    value_dim: int | None = None,
    has_weights: bool = False,
    forgets: bool = False,
    state_dtype: str = "float32",
    num_sinks: int | None = None,
    window: int | None = None,
) -> StateSpec:
    """The tensors of an `OVQState` of one row with `num_slots` slots per head.

    Args:
        num_slots: M.
        num_kv_heads: Hkv.
        head_dim: K.
        chunk_size: C.
        dtype: dtype of the inputs.
        value_dim: V; None means K.
        has_weights: whether tokens have weights.
        forgets: whether the state has `pending_forget`, and then weights, too.
        state_dtype: format of the sums.
        num_sinks: S; None for states of `ovq_attention`. Others are those of heads of converted models.
        window: W; None for C.

    Example:
        >>> slot_spec(5, num_kv_heads=2, head_dim=8, chunk_size=4, dtype=torch.bfloat16)["key_sum"]
        ((2, 5, 8), torch.float32)
    """
    wide, value_dim = wide_dtype(dtype), head_dim if value_dim is None else value_dim
    own = {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(state_dtype, wide)
    num_exact = (num_sinks or 0) + (chunk_size if window is None else window)
    slots, tokens = (num_kv_heads, num_slots), (num_kv_heads, num_exact)
    spec: StateSpec = {
        "key_sum": ((*slots, head_dim), own),
        "value_sum": ((*slots, value_dim), own),
        "count": (slots, torch.int64),
        "pending_keys": ((*tokens, head_dim), dtype),
        "pending_values": ((*tokens, value_dim), dtype),
        "num_seen": ((), torch.int64),
    }
    if has_weights or forgets:
        spec["weight"] = slots, wide
        if num_sinks is None:
            spec["pending_weights"] = tokens, wide
        else:
            # Merges predict the weights of tokens.
            spec["token_use"] = (num_kv_heads, head_dim + value_dim + 1), torch.float32
    if num_sinks is not None:
        spec["position_sum"] = slots, torch.int64
        spec["key_unit"] = (num_kv_heads,), wide
        spec["sink_keys"] = (num_kv_heads, num_sinks, head_dim), dtype
    if forgets:
        spec["pending_forget"] = ((num_kv_heads,), torch.float64)
    if state_dtype == "int8":
        spec |= dict.fromkeys(("key_step", "value_step"), (slots, torch.bfloat16))
    return spec


def spec_of(
    tensors: Mapping[str, Tensor],
    chunk_size: int,
    dtype: torch.dtype,
    *,
    num_sinks: int = 0,
    window: int | None = None,
) -> StateSpec:
    """The specification that the tensors of a state should match, for their own sizes and optional tensors.

    Args:
        tensors: by name; sizes are taken from `count`, `key_sum` and `value_sum`.
        chunk_size: C.
        dtype: dtype of the inputs.
        num_sinks, window: S and W of a head of a converted model; W is None in others.
    """
    num_rows, num_kv_heads, num_slots = tensors["count"].shape
    # With a wrong number of dimensions they match no specification, so 0 will do.
    sums = (tensors["key_sum"], tensors["value_sum"])
    head_dim, value_dim = (x.shape[3] if x.dim() == 4 else 0 for x in sums)
    spec = slot_spec(
        num_slots,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        chunk_size=chunk_size,
        dtype=dtype,
        has_weights="weight" in tensors,
        forgets="pending_forget" in tensors,
        state_dtype=state_dtype_of(tensors["key_sum"].dtype),
        num_sinks=None if window is None else num_sinks,
        window=window,
    )
    return of_rows(spec, num_rows)


def of_rows(spec: StateSpec, num_rows: int) -> StateSpec:
    """Specification of `num_rows` rows from the specification of one; rows are the first dimension.

    Example:
        >>> of_rows({"count": ((3,), torch.int64)}, 2)
        {'count': ((2, 3), torch.int64)}
    """
    return {name: ((num_rows, *shape), dtype) for name, (shape, dtype) in spec.items()}


def check_tensors(where: str, tensors: Mapping[str, Tensor], spec: StateSpec) -> None:
    """Raise ValueError, naming `where`, unless the tensors match the specification and are finite.

    Example:
        >>> check_tensors("file", {"count": torch.ones(2)}, {"count": ((3,), torch.int64)})
        Traceback (most recent call last):
        ValueError: file: expected count of shape [3] in torch.int64, found [2] in torch.float32
    """
    for name, (shape, dtype) in spec.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{where}: expected {name} of shape {list(shape)} in {dtype}, "
                f"found {list(tensor.shape)} in {tensor.dtype}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: expected finite values in {name}, found NaN or Inf")
