"""Fidelity without training: error of the outputs of memories against exact attention, at equal bytes.

The memories read a growing stream of keys and values. At each length their outputs for the same queries are
compared with softmax attention over all tokens so far. No model is trained, so only the memory is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ovq_lab.figures.fidelity.memories import CHUNK_SIZE, MEMORIES, softmax_read
from ovq_lab.figures.fidelity.streams import STREAMS

_LENGTHS = tuple(2**power for power in range(10, 17))
_NUM_QUERIES = 256
_SAMPLE_TOKENS = 16384


@torch.no_grad()
def fidelity_rows(
    seed: int,
    *,
    lengths: Sequence[int] = _LENGTHS,
    streams: Sequence[str] = tuple(STREAMS),
    num_slots: int = 256,
    head_dim: int = 64,
) -> list[dict[str, Any]]:
    """Measure the error of every memory on every stream as the stream grows.

    All memories have the bytes of OVQ's slots: `num_slots` times a key, a value and a count. Lengths are ends
    of chunks, where OVQ has no pending tokens. Parameters that are fixed before a stream begins (the codebook
    of static VQ, the rate of the delta rule) are fitted on a sample of 16384 other tokens. Offline k-means
    sees all tokens at once; it is a reference and not a memory.

    Args:
        lengths: Tokens after which to measure, ascending, each a multiple of 64.
        streams: Names in `ovq_lab.figures.fidelity.streams.STREAMS`.

    Returns:
        A JSON-ready row for each stream, memory and length: `stream`, `seed`, `memory`, `length`, `bytes` of
        the memory when full, and `error`: the root mean squared difference to exact attention over 256
        queries, divided by the root mean square of exact attention, so that an output of 0 has an error of 1.
        For the figure, the memory is the `line` and the stream the `group`.
    """
    scale = head_dim**0.5
    # A key, a value, and a count of 64 bits.
    num_bytes = num_slots * 4 * (2 * head_dim + 2)
    rows = []
    for name in streams:
        sample, stream = STREAMS[name](seed, _SAMPLE_TOKENS, lengths[-1] + _NUM_QUERIES, head_dim)
        queries = {length: stream.queries[length : length + _NUM_QUERIES] for length in lengths}
        exact = {
            length: softmax_read(queries[length], stream.keys[:length], stream.values[:length], scale)
            for length in lengths
        }
        for kind in MEMORIES:
            memory = kind(num_bytes, scale=scale, sample=sample, seed=seed)
            found = {"line": kind.name, "group": name, "stream": name, "memory": kind.name, "seed": seed}
            before = 0
            for length in lengths:
                assert length % CHUNK_SIZE == 0, "the state of OVQ holds whole chunks"
                memory.append(stream.keys[before:length], stream.values[before:length])
                before = length
                distance = memory.read(queries[length]) - exact[length]
                error = float(distance.square().mean().sqrt() / exact[length].square().mean().sqrt())
                rows.append({**found, "length": length, "bytes": memory.nbytes, "error": error})
    return rows
