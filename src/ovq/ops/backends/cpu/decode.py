"""Decode steps, one token per row: the kernels merge complete chunks; `torch` does the reads."""

from __future__ import annotations

from ovq.ops.backends.alignment import AlignedRows
from ovq.ops.backends.cpu.kernels import learn
from ovq.ops.backends.dictionary import Dictionary, dense_copy
from ovq.ops.backends.plan import Plan
from ovq.ops.call import Rows
from ovq.ops.options import Options
from ovq.ops.state import OVQState


def learn_chunk(rows: OVQState, before: list[int], after: list[int], options: Options) -> Dictionary:
    """The compiled version of the `torch` backend's `learn_chunk`."""
    size, num = options.chunk_size, len(before)
    one_chunk_each = Rows(tuple(range(0, num * size, size)), (size,) * num)
    aligned = AlignedRows(one_chunk_each, pending=[0] * num, chunk_size=size, num_tokens=num * size)
    plan = Plan(
        aligned=aligned,
        slots=[list(sizes) for sizes in zip(before, after, strict=True)],
        num_merged=[t - size for t in rows.num_seen.tolist()],
        num_kv_heads=rows.count.shape[1],
        group_size=0,
        options=options,
    )
    sums = Dictionary(*(dense_copy(x) for x in (rows.key_sum, rows.value_sum, rows.count)))
    learn(rows.pending_keys.transpose(1, 2), rows.pending_values.transpose(1, 2), sums, plan)
    return Dictionary(*(x.flatten(0, 1) for x in (sums.key_sum, sums.value_sum, sums.count)))
