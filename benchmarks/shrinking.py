"""What a dictionary still knows once it is a quarter as large: `python benchmarks/shrinking.py`.

A stream is read into 1024 slots, which are then made 256: by merging the cheapest pairs (`OVQState.resize`),
and by keeping the slots used most, each other going to the kept slot of the largest cosine. Errors are those
of `ovq reproduce --only fidelity`: of 256 queries against exact attention over all tokens, relative to its
size. `docs/results.md` has what this printed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import normalize

from ovq.ops import OVQState, ovq_attention
from ovq.research.fidelity.memories import CHUNK_SIZE, softmax_read
from ovq.research.fidelity.streams import STREAMS

TOKENS, QUERIES, DIM = 8192, 256, 64
LARGE, SMALL = 1024, 256
SEEDS = (0, 1, 2)


def most_used(state: OVQState) -> OVQState:
    """`state` of one head with the slots used most, and the others merged into those nearest to them."""
    key_sum, value_sum, count = (x[0, 0] for x in (state.key_sum, state.value_sum, state.count))
    by_use = count.argsort(descending=True, stable=True)
    kept, dropped = (part.sort().values for part in by_use.tensor_split([SMALL]))
    means = normalize(state.keys[0, 0], dim=-1)
    target = (means[dropped] @ means[kept].T).argmax(-1)
    key_sum, value_sum, count = (
        x[kept].index_add(0, target, x[dropped])[None, None] for x in (key_sum, value_sum, count)
    )
    return dataclasses.replace(state, key_sum=key_sum, value_sum=value_sum, count=count, num_slots=SMALL)


WAYS: dict[str, Callable[[OVQState], OVQState]] = {
    "1024 slots": lambda state: state,
    "256, cheapest pairs": lambda state: state.resize(SMALL),
    "256, most used": most_used,
}


@torch.no_grad()
def errors(name: str, seed: int, merge: str) -> list[float]:
    """Of each of `WAYS`, and of 256 slots from the first token on."""
    _, stream = STREAMS[name](seed, 1, TOKENS + QUERIES, DIM)
    queries = stream.queries[TOKENS:]
    exact = softmax_read(queries, stream.keys[:TOKENS], stream.values[:TOKENS], DIM**0.5)
    states = {}
    for num_slots in (LARGE, SMALL):
        keys, values = (x[None, :TOKENS, None] for x in (stream.keys, stream.values))
        _, states[num_slots] = ovq_attention(
            keys,
            keys,
            values,
            num_slots=num_slots,
            chunk_size=CHUNK_SIZE,
            merge=merge,
            output_final_state=True,
        )
    found = []
    for state in (*(way(states[LARGE]) for way in WAYS.values()), states[SMALL]):
        o = softmax_read(queries, state.keys[0, 0], state.values[0, 0], DIM**0.5, state.count[0, 0])
        found.append(float((o - exact).norm() / exact.norm()))
    return found


def main() -> None:
    """Print a row for each stream and rule that the dictionary was learned by."""
    console = Console(width=140)
    table = Table("stream", "learned by merge=", *WAYS, "256 from the start")
    for name in ("clustered", "text"):
        for merge in ("existing", "ward"):
            found = zip(*(errors(name, seed, merge) for seed in SEEDS), strict=True)
            table.add_row(
                name, merge, *(f"{statistics.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})" for x in found)
            )
    console.print(table)


if __name__ == "__main__":
    main()
