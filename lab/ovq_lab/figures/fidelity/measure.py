"""Fidelity without training: how far the read of each memory is from exact attention, at equal bytes.

The memories read a growing stream of keys and values. At each length they answer the same queries, and their
answers are compared with those of softmax attention over all tokens so far. No model is trained, so only the
memory is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ovq_lab.figures.fidelity.memories import CHUNK_SIZE, MEMORIES, softmax_read
from ovq_lab.figures.fidelity.streams import STREAMS, Stream

LENGTHS = tuple(2**power for power in range(10, 17))
_NUM_QUERIES = 256
_SAMPLE_TOKENS = 16384


@torch.no_grad()
def fidelity_rows(
    seeds: Sequence[int] = (0, 1, 2),
    *,
    lengths: Sequence[int] = LENGTHS,
    streams: Sequence[str] = tuple(STREAMS),
    num_slots: int = 256,
    head_dim: int = 64,
    beta: float = 1.0,
    on_stream: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Measure the error of every memory on every stream as the stream grows.

    The budget of all memories is what the slots of OVQ take: `num_slots` times a key, a value and a count.
    Lengths are ends of chunks, where OVQ has no pending tokens. What must be fixed before a stream begins
    (the codebook of static VQ, the rate of the delta rule) is fitted on a sample of 16384 other tokens.
    Offline k-means sees all tokens at once; it is an upper bound and not a memory.

    Args:
        seeds: For each, there are a stream, a sample, queries and random choices.
        lengths: Tokens after which to ask, each a multiple of 64.
        streams: Names in `ovq_lab.figures.fidelity.streams.STREAMS`.
        num_slots: Slots of OVQ, N.
        head_dim: Components of keys and of values.
        beta: The scale of the dot products is beta times the square root of `head_dim`, as in the layers.
        on_stream: Called with what is measured next, for a progress report.

    Returns:
        A JSON-ready row for each stream, seed, memory and length: `stream`, `seed`, `memory`, `length`,
        `bytes` of the memory when full, and `error`: the root of the mean squared distance to exact attention
        over 256 queries, divided by the root mean square of exact attention. Answering 0 has an error of 1.

    Raises:
        ValueError: If a stream is unknown, there are no lengths, or a length is not a multiple of the chunk.
        ImportError: If scikit-learn is not installed (`pip install './lab[theory]'`).

    Example:
        >>> rows = fidelity_rows([0], lengths=[128, 256], streams=["random"], num_slots=16, head_dim=8)
        >>> len(rows), rows[0]["memory"], rows[0]["length"], rows[0]["bytes"]
        (16, 'OVQ', 128, 1152)
    """
    if not lengths or any(length < 1 or length % CHUNK_SIZE for length in lengths):
        raise ValueError(f"lengths: expected positive multiples of {CHUNK_SIZE}, found {list(lengths)}")
    if unknown := [name for name in streams if name not in STREAMS]:
        raise ValueError(f"streams: expected names among {', '.join(STREAMS)}, found {unknown}")
    lengths = sorted(lengths)
    rows = []
    for name in streams:
        for seed in seeds:
            on_stream(f"{name}, seed {seed}")
            sample, stream = STREAMS[name](seed, _SAMPLE_TOKENS, lengths[-1] + _NUM_QUERIES, head_dim)
            errors = _errors(stream, sample, lengths, num_slots, beta * head_dim**0.5, seed)
            rows += [{"stream": name, "seed": seed, **row} for row in errors]
    return rows


def _errors(
    stream: Stream, sample: Stream, lengths: Sequence[int], num_slots: int, scale: float, seed: int
) -> list[dict[str, Any]]:
    """The rows of one stream."""
    # A key, a value, and a count of 64 bits.
    num_bytes = num_slots * 4 * (stream.keys.shape[1] + stream.values.shape[1] + 2)
    queries = {length: stream.queries[length : length + _NUM_QUERIES] for length in lengths}
    exact = {
        length: softmax_read(queries[length], stream.keys[:length], stream.values[:length], scale)
        for length in lengths
    }
    rows = []
    for kind in MEMORIES:
        memory = kind(num_bytes, scale=scale, sample=sample, seed=seed)
        before = 0
        for length in lengths:
            memory.append(stream.keys[before:length], stream.values[before:length])
            before = length
            distance = memory.read(queries[length]) - exact[length]
            error = float(distance.square().mean().sqrt() / exact[length].square().mean().sqrt())
            rows.append({"memory": kind.name, "length": length, "bytes": memory.nbytes, "error": error})
    return rows
