"""The memory of a converted model in compiled code: heads read new tokens and merge old ones, in place."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ovq.ops.backends.cpu import build
from ovq.ops.backends.cpu.kernels import DTYPES, FORMATS
from ovq.ops.backends.cpu.mirrors import MIRRORS, Mirror
from ovq.ops.narrow import state_dtype_of
from ovq.ops.options import NUM_PARTS, TIE, Options


def advance_memory(groups: Sequence[HeadGroup]) -> None:
    """Groups of heads read their new tokens and merge old ones, in place (see `HeadGroup.of`)."""
    array = (HeadGroup * len(groups))(*groups)
    build.load().ovq_memory(array, ctypes.c_int64(len(groups)), ctypes.c_int64(torch.get_num_threads()))


class HeadGroup(Mirror):
    """`HeadGroup` of memory.h."""

    _fields_ = MIRRORS["HeadGroup"]._fields_

    @classmethod
    def of(
        cls,
        tensors: dict[str, Tensor],
        *,
        heads: Sequence[int],
        num_sinks: int,
        chunk_size: int,
        options: Options | None,
        filled: Sequence[int],
        num_merged: Sequence[int],
        lengths: Sequence[int],
        schedule: Sequence[Sequence[int]],
        k: Tensor,
        v: Tensor,
        q: Tensor | None = None,
        o: Tensor | None = None,
        temperature: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> HeadGroup:
        """Kernel arguments of a group of h key/value heads of B rows.

        Args:
            tensors: `pending_keys` `[B, h, P, K]` and `pending_values`, the exact tokens, in the dtype of k;
                `key_sum` `[B, h, N, K]` and `value_sum`, float32, bfloat16, or int8 with `key_step`
                `[B, h, N]` and `value_step`, bfloat16; `count` `[B, h, N]` and `position_sum`, int64;
                `key_unit` `[B, h]`, float32. They are contiguous and change in place. With token weights,
                `token_use` `[B, h, K + V + 1]` predicts these from keys and values, and `weight` `[B, h, N]`,
                float32, holds those of slots.
            heads: the key/value heads of k and v that these are.
            num_sinks: first tokens that stay. chunk_size: number of tokens merged once P are exact.
            options: the update rule of the slots; None if there are none, N = 0.
            filled: exact tokens of each row. num_merged: tokens merged, or dropped, of each row.
            lengths: new tokens of each row, which come first.
            schedule: for each row, slots in use before and after each merge of the call.
            k: `[B, Hkv, T, K]`. v: `[B, Hkv, T, V]`. q: `[B, H, T, K]`, scaled; None if nothing is read.
            o: `[B, H, T, V]` in the dtype of q, which gets the outputs.
            temperature: `[H]` float32, factor of the scores of slots of several tokens. bias: `[H]`, added to
                them.
        """
        starts = itertools.accumulate((len(sizes) for sizes in schedule), initial=0)
        group = cls(
            num_rows=k.shape[0],
            num_kv_heads=len(heads),
            group_size=0 if q is None else q.shape[1] // k.shape[1],
            chunk_size=chunk_size,
            capacity=tensors["count"].shape[2],
            num_exact=tensors["pending_keys"].shape[2],
            num_sinks=num_sinks,
            key_dim=k.shape[3],
            value_dim=v.shape[3],
            dtype=DTYPES.index(k.dtype),
            query_dtype=DTYPES.index(k.dtype if q is None else q.dtype),
            state_dtype=FORMATS.index(state_dtype_of(tensors["key_sum"].dtype)),
            tie=TIE,
        )
        if options is not None:
            group.merges_pairs = options.merges_pairs
            group.num_parts = NUM_PARTS
            group.value_weight, group.mass_power = options.value_weight, options.mass_power
        group._numbers = {}
        group.point(**tensors, temperature=temperature, bias=bias)
        # Faster to make than small tensors.
        for name, kind, numbers in (
            ("heads", ctypes.c_int64, heads),
            ("filled", ctypes.c_int64, filled),
            ("num_merged", ctypes.c_int64, num_merged),
            ("length", ctypes.c_int64, lengths),
            ("schedule_start", ctypes.c_int64, list(starts)[:-1]),
            ("schedule", ctypes.c_int32, list(itertools.chain(*schedule))),
        ):
            array = (kind * len(numbers))(*numbers)
            setattr(group, name, ctypes.addressof(array))
            group._numbers[name] = array
        for name, x in (("q", q), ("k", k), ("v", v), ("o", o)):
            if x is not None:
                assert x.stride(-1) == 1, name
                setattr(group, name, group.place(x))
                setattr(group, f"{name}_at", MIRRORS["Strides"](*x.stride()[:3]))
        return group

    _numbers: dict[str, Any]

    def put(self, name: str, numbers: Sequence[int]) -> None:
        """Change `filled`, `num_merged` or `schedule` (all rows one after the other) for the next call."""
        self._numbers[name][:] = numbers
