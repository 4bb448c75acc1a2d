"""States on disk: one safetensors file, written atomically and checked before use.

Never pickle: a state file may come from an untrusted source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ovq.ops.narrow import state_dtype_of
from ovq.ops.parts import check_tensors, slot_spec, spec_of
from ovq.ops.schedule import tokens_merged
from ovq.ops.sums import DTYPES
from ovq.runtime.files import atomic_path, writing

FORMAT = "ovq-state"
VERSION = "1"
# File version of states with weights, which earlier releases would misread.
WITH_WEIGHTS = "2"
# File version of states with forgetting, likewise.
WITH_FORGETTING = "3"
# File version of states whose sums are in another format than float32 (`narrow.py`), likewise.
NARROW = "4"
# File version of states of heads of converted models, with sinks and a window.
WINDOWED = "5"
MAX_TOKENS = 2**62
"""Maximum number of tokens of a row in a file; with more, its int64 counts could overflow later."""


def save_state(path: str | os.PathLike, tensors: dict[str, Tensor], sizes: Mapping[str, int | None]) -> None:
    """Write the tensors of a state to `path`; see `OVQState.save`."""
    if sizes["window"] is not None:
        version = WINDOWED
    elif state_dtype_of(tensors["key_sum"].dtype) != "float32":
        version = NARROW
    elif "pending_forget" in tensors:
        version = WITH_FORGETTING
    else:
        version = WITH_WEIGHTS if "weight" in tensors else VERSION
    names = list(sizes) if version == WINDOWED else ["num_slots", "chunk_size"]
    written = {name: str(sizes[name]) for name in names}
    write_file(path, tensors, metadata={"format": FORMAT, "version": version, **written})


def write_file(path: str | os.PathLike, tensors: dict[str, Tensor], *, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically: on failure, an existing file is unchanged.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_path(path) as temporary, writing(path):
        save_file(tensors, temporary, metadata=metadata)


def format_of(path: str | os.PathLike) -> str | None:
    """`format` in the metadata of a safetensors file; None if there is none or the file cannot be read.

    `read_file` raises the errors for invalid files.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return (file.metadata() or {}).get("format")
    except (OSError, SafetensorError):
        return None


def read_file(
    path: str | os.PathLike, *, what: str, file_format: str, version: Sequence[str]
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file, read only if its header has the right format and version.

    Args:
        what: description of the expected file, for error messages.
        file_format: required `format` of the metadata.
        version: accepted values of `version` in the metadata.

    Raises:
        ValueError: if the file is missing or damaged, or has another format or version.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: expected {what}, found {found}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            for name, expected in (("format", [file_format]), ("version", version)):
                if metadata.get(name) not in expected:
                    known = " or ".join(map(repr, expected))
                    raise ValueError(f"{path}: expected {name} {known}, found {metadata.get(name)!r}")
            names = file.keys()
            return metadata, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected {what}, found a file that is damaged or foreign ({error})"
        ) from error


def load_state(path: str | os.PathLike, *, device: torch.device | str) -> dict[str, Any]:
    """Checked fields of the state in the file `path`; see `OVQState.load`."""
    metadata, tensors = read_file(
        path,
        what="a saved OVQ state",
        file_format=FORMAT,
        version=(VERSION, WITH_WEIGHTS, WITH_FORGETTING, NARROW, WINDOWED),
    )
    is_windowed = metadata["version"] == WINDOWED
    tensors = upgraded(tensors)
    # Only the names are used here, so the sizes do not matter.
    sizes: dict[str, Any] = {"num_kv_heads": 0, "head_dim": 0, "chunk_size": 0, "dtype": torch.float32}
    sums = tensors.get("key_sum")
    names = slot_spec(
        0,
        **sizes,
        has_weights="weight" in tensors,
        forgets="pending_forget" in tensors,
        state_dtype="float32" if sums is None else state_dtype_of(sums.dtype),
        num_sinks=0 if is_windowed else None,
    ).keys()
    if tensors.keys() != names:
        raise ValueError(f"{path}: expected tensors {sorted(names)}, found {sorted(tensors)}")
    least = {"num_slots": 1, "chunk_size": 1}
    if is_windowed:
        least = {"num_slots": 0, "chunk_size": 1, "num_sinks": 0, "window": 1}
    for name in ("window", "num_sinks"):
        # Version 0.1 wrote these fields, with another meaning, if they were not 0.
        if name in metadata and not is_windowed:
            raise ValueError(f"{path}: {name} was removed; expected 0, found {metadata[name][:40]}")
    sizes = {name: whole_number(path, metadata, name, least=n) for name, n in least.items()}
    check_state_tensors(str(path), tensors, **sizes)
    moved = {name: t if name == "num_seen" else t.to(device) for name, t in tensors.items()}
    return moved | sizes


def upgraded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a state or layer from an old file, converted to the current dtypes."""
    # `pending_forget` used to have the dtype of the sums.
    old = tensors.get("pending_forget")
    if old is None or old.dtype != torch.float32:
        return tensors
    return tensors | {"pending_forget": old.double()}


def whole_number(path: str | os.PathLike, metadata: dict[str, str], name: str, *, least: int = 1) -> int:
    """An integer of at least `least` from the metadata of a file.

    Raises:
        ValueError: if it is missing, not an integer, or out of range.

    Example:
        >>> whole_number("file", {"num_slots": "8"}, "num_slots")
        8
    """
    text = metadata.get(name, "")
    # The length is limited, as `int` raises another error for thousands of digits.
    if not (text.isdecimal() and len(text) < 20 and least <= int(text) <= MAX_TOKENS):
        raise ValueError(
            f"{path}: expected {name} to be an integer from {least} to 2^62, found {text[:40]!r}"
        )
    return int(text)


def check_state_tensors(
    where: str,
    tensors: Mapping[str, Tensor],
    *,
    num_slots: int,
    chunk_size: int,
    num_sinks: int = 0,
    window: int | None = None,
) -> None:
    """Raise ValueError unless `tensors` are a valid state: shapes, dtypes, finite values, right counts."""

    def expect(is_right: bool, expected: str, found: object) -> None:
        if not is_right:
            raise ValueError(f"{where}: expected {expected}, found {found}")

    count, num_seen, dtype = tensors["count"], tensors["num_seen"], tensors["pending_keys"].dtype
    # Checked first, as PyTorch cannot compute with all dtypes that a file can hold.
    expect(dtype in DTYPES, f"pending_keys in one of {DTYPES}", dtype)
    is_shaped = count.dim() == 3 and count.shape[1] > 0
    expect(is_shaped, "count of shape [B, Hkv, M], Hkv at least 1", tuple(count.shape))
    expect(count.shape[2] <= num_slots, f"at most {num_slots} slots", count.shape[2])
    spec = spec_of(tensors, chunk_size, dtype, num_sinks=num_sinks, window=window)
    check_tensors(where, tensors, spec)
    is_countable = bool(((num_seen >= 0) & (num_seen <= MAX_TOKENS)).all())
    expect(is_countable, "num_seen from 0 to 2^62", num_seen.tolist())
    merged = tokens_merged(num_seen, chunk_size=chunk_size, num_sinks=num_sinks, window=window)
    # Re-positioned slots count for fewer tokens.
    check_counts(where, count, total=merged, is_most=window is not None)
    _check_open_slots(where, tensors)
    if "weight" in spec:
        for name in {"weight", "pending_weights"} & spec.keys():
            expect(not bool((tensors[name] < 0).any()), f"numbers of at least 0 in {name}", "others")
        expect(not bool(tensors["weight"][count == 0].any()), "a weight of 0 for spare slots", "others")
    if "pending_forget" in spec:
        is_log = bool((tensors["pending_forget"] <= 0).all())
        expect(is_log, "numbers of at most 0 in pending_forget", "others")


def check_counts(where: str, count: Tensor, *, total: Tensor | int, is_most: bool = False) -> None:
    """Raise ValueError unless the counts of each head are at least 0 and add up to `total`.

    Args:
        where: source of the counts, for error messages.
        count: `[B, Hkv, M]` int64.
        total: number of tokens of each head, or `[B]` of the heads of each row.
        is_most: whether they may add up to less.
    """
    if count.numel() and (least := int(count.min())) < 0:
        raise ValueError(f"{where}: expected counts of at least 0, found {least}")
    # A cumulative sum of int64 numbers turns negative when it overflows.
    if bool((count.cumsum(-1) < 0).any()):
        raise ValueError(
            f"{where}: expected counts that add up within int64, found {count.amax(-1).tolist()}"
        )
    merged = torch.as_tensor(total).view(-1, 1).expand(count.shape[:2])
    found = count.sum(-1)
    if bool((found > merged).any() if is_most else (found != merged).any()):
        raise ValueError(
            f"{where}: expected counts that add up to {'at most ' if is_most else ''}the tokens merged, "
            f"{merged.tolist()}, "
            f"found {found.tolist()}"
        )


def _check_open_slots(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless all heads of a row have equally many slots in use, before the spare slots.

    The op reads that number from a single head and ignores all slots beyond it, so it would miss slots of any
    other state.
    """
    is_open = tensors["count"] > 0
    num_open = is_open.sum(-1)
    if not bool((num_open == num_open[:, :1]).all()):
        raise ValueError(
            f"{where}: expected as many slots in use in each head of a row, found {num_open.tolist()}"
        )
    if bool((is_open[..., 1:] & ~is_open[..., :-1]).any()):
        raise ValueError(f"{where}: expected slots in use before spare ones, found a spare one before")
    for name in ("key_sum", "value_sum"):
        if bool((tensors[name].ne(0).any(-1) & ~is_open).any()):
            raise ValueError(f"{where}: expected zeros in {name} of spare slots, found others")
