"""States on disk: one safetensors file, written atomically and believed only after it was checked.

Never pickle: a state file may come from anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ovq.files import atomic_path
from ovq.ops.state import OVQState, state_dtype

FORMAT = "ovq-state"
VERSION = "1"
STATE_TENSORS = ("key_sum", "value_sum", "count", "pending_keys", "pending_values", "num_seen")


def state_tensors(state: OVQState) -> dict[str, Tensor]:
    """The tensors of a state as they are written, on the CPU.

    Example:
        >>> state = OVQState.empty(
        ...     batch_size=1, num_kv_heads=1, key_dim=4, value_dim=4, num_slots=8, chunk_size=4
        ... )
        >>> sorted(state_tensors(state))
        ['count', 'key_sum', 'num_seen', 'pending_keys', 'pending_values', 'value_sum']
    """
    tensors = {name: getattr(state, name).detach().cpu().contiguous() for name in STATE_TENSORS}
    # Places beyond num_pending may hold tokens of another continuation: they are nobody's business on disk.
    used = torch.arange(state.chunk_size) < state.num_pending[:, None]
    for name in ("pending_keys", "pending_values"):
        tensors[name] = tensors[name].masked_fill(~used[:, None, :, None], 0)
    return tensors


def save_state(state: OVQState, path: str | os.PathLike) -> None:
    """Write `state` to `path`; see `OVQState.save`."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "num_slots": str(state.num_slots),
        "chunk_size": str(state.chunk_size),
    }
    with atomic_path(path) as temporary:
        save_file(state_tensors(state), temporary, metadata=metadata)


def read_file(
    path: str | os.PathLike, *, what: str, file_format: str, version: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file of ours, read only if its header says that it is one.

    Args:
        path: the file.
        what: what it should be, for error messages.
        file_format: the `format` its metadata must name.
        version: the `version` its metadata must name.

    Raises:
        ValueError: no such file, one that is damaged, or one of another format or version.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected {what}, found no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            for name, expected in (("format", file_format), ("version", version)):
                if metadata.get(name) != expected:
                    raise ValueError(f"{path}: expected {name} {expected!r}, found {metadata.get(name)!r}")
            names = file.keys()
            return metadata, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected {what}, found a file that is damaged or foreign ({error})"
        ) from error


def load_state(path: str | os.PathLike, *, device: torch.device | str = "cpu") -> OVQState:
    """Read and check the state at `path`; see `OVQState.load`."""
    metadata, tensors = read_file(path, what="a saved OVQ state", file_format=FORMAT, version=VERSION)
    if set(tensors) != set(STATE_TENSORS):
        raise ValueError(f"{path}: expected tensors {sorted(STATE_TENSORS)}, found {sorted(tensors)}")
    num_slots = _positive_int(path, metadata, "num_slots")
    chunk_size = _positive_int(path, metadata, "chunk_size")
    check_tensors(str(path), tensors, num_slots=num_slots, chunk_size=chunk_size)
    moved = {name: t if name == "num_seen" else t.to(device) for name, t in tensors.items()}
    return OVQState(**moved, num_slots=num_slots, chunk_size=chunk_size)


def _positive_int(path: str | os.PathLike, metadata: dict[str, str], name: str) -> int:
    text = metadata.get(name, "")
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{path}: expected {name} to be an integer of at least 1, found {text!r}")
    return int(text)


def check_tensors(where: str, tensors: dict[str, Tensor], *, num_slots: int, chunk_size: int) -> None:
    """Raise ValueError unless `tensors` can be a state: shapes, dtypes, finite values, counts that add up."""

    def expect(is_right: bool, expected: str, found: object) -> None:
        if not is_right:
            raise ValueError(f"{where}: expected {expected}, found {found}")

    key_sum, value_sum, count, pending_keys, pending_values, num_seen = (tensors[n] for n in STATE_TENSORS)
    expect(count.dim() == 3, "count of shape [B, Hkv, M]", tuple(count.shape))
    batch, heads, rows = count.shape
    expect(rows <= num_slots, f"at most {num_slots} slots", rows)
    for name, t, length in (
        ("key_sum", key_sum, rows),
        ("value_sum", value_sum, rows),
        ("pending_keys", pending_keys, chunk_size),
        ("pending_values", pending_values, chunk_size),
    ):
        expected = f"{name} of shape [{batch}, {heads}, {length}, D]"
        expect(t.dim() == 4 and t.shape[:3] == (batch, heads, length), expected, tuple(t.shape))
        expect(t.is_floating_point(), f"{name} of a floating dtype", t.dtype)
        expect(bool(torch.isfinite(t).all()), f"finite values in {name}", "NaN or Inf")
    for a, b in (("key_sum", "pending_keys"), ("value_sum", "pending_values")):
        same = tensors[a].shape[3] == tensors[b].shape[3]
        expect(same, f"{a} and {b} of one width", (tensors[a].shape[3], tensors[b].shape[3]))
    expect(pending_keys.dtype == pending_values.dtype, "one dtype of pending tokens", pending_values.dtype)
    for name in ("key_sum", "value_sum"):
        wanted = state_dtype(pending_keys.dtype)
        expect(tensors[name].dtype == wanted, f"{name} in {wanted}", tensors[name].dtype)
    expect(count.dtype == torch.int64, "count in int64", count.dtype)
    expect(num_seen.dtype == torch.int64, "num_seen in int64", num_seen.dtype)
    expect(num_seen.shape == (batch,), f"num_seen of shape [{batch}]", tuple(num_seen.shape))
    expect(bool((count >= 0).all()), "counts >= 0", int(count.min()) if count.numel() else 0)
    expect(bool((num_seen >= 0).all()), "num_seen >= 0", num_seen.tolist())
    merged = (num_seen - num_seen % chunk_size)[:, None].expand(batch, heads)
    adds_up = bool((count.sum(-1) == merged).all())
    expect(adds_up, f"counts that add up to the tokens merged, {merged.tolist()}", count.sum(-1).tolist())
