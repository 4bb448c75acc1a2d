"""What Ward's rule costs on the compiled kernels: `python benchmarks/ward_speed.py`.

Forward, forward and backward, and decoding beside the paper's rule, in interleaved calls, on keys and values
that are independent of each other, where no two tokens are near, and on noisy repeats of 600 pairs. Times are
those of the processor, on one thread, which other work on the machine disturbs less than the clock's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from ovq.ops import backend_used, ovq_attention

HEADS, DIM, SLOTS, CHUNK, TOKENS, DECODED = 8, 64, 1024, 256, 16384, 1024
RULES = {"paper's": {}, "paper's, 4096 slots": {"num_slots": 4096}, "Ward": {"merge": "ward"}}

Inputs = tuple[Tensor, Tensor, Tensor]


def independent(length: int) -> Inputs:
    """Queries, keys and values that have nothing to do with each other."""
    q, k, v = (torch.randn(1, length, HEADS, DIM) for _ in range(3))
    return normalize(q, dim=-1), normalize(k, dim=-1), v


def repeats(length: int) -> Inputs:
    """Keys near one of 600, each with a value of its own."""
    q, keys, values = *independent(length)[:2], torch.randn(600, HEADS, DIM)
    which = torch.randint(600, (1, length))
    centres = normalize(torch.randn(600, HEADS, DIM), dim=-1)[which]
    return q, normalize(centres + 0.4 * keys, dim=-1), values[which]


def attend(inputs: Inputs, **options) -> tuple[Tensor, object]:
    """A call with the sizes of the benchmark."""
    return ovq_attention(*inputs, **{"num_slots": SLOTS, "chunk_size": CHUNK, **options})


def forward(inputs: Inputs, options: dict) -> None:
    """Without gradients."""
    with torch.no_grad():
        attend(inputs, **options)


def backward(inputs: Inputs, options: dict) -> None:
    """With them."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    attend(leaves, **options)[0].sum().backward()


def decode(inputs: Inputs, options: dict) -> None:
    """Tokens one by one, after those of a prompt: timed without it."""
    state = options.pop("initial_state")
    with torch.no_grad():
        for t in range(DECODED):
            one = tuple(x[:, t : t + 1] for x in inputs)
            _, state = attend(one, initial_state=state, output_final_state=True, **options)


def seconds(run: Callable[[Inputs, dict], None], inputs: Inputs, options: dict) -> float:
    """Processor time of a call."""
    options = dict(options)
    if run is decode:
        with torch.no_grad():
            options["initial_state"] = attend(inputs, output_final_state=True, **options)[1]
    begun = time.process_time()
    run(inputs, options)
    return time.process_time() - begun


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    console = Console(width=110)
    table = Table("inputs", "what", *RULES, "Ward / paper's", "Ward / 4096 slots", title="medians of 3, ms")
    cases = [(make, run) for make in (independent, repeats) for run in (forward, backward, decode)]
    for make, run in track(cases, "rules", console=Console(stderr=True)):
        inputs = make(TOKENS)
        times = [[seconds(run, inputs, rule) for rule in RULES.values()] for _ in range(3)]
        paper, large, ward = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        per = DECODED if run is decode else 1
        shown = (f"{x / per:.3g}" for x in (paper, large, ward))
        table.add_row(make.__name__, run.__name__, *shown, f"{ward / paper:.2f}", f"{ward / large:.2f}")
    console.print(table)
    console.print(f"{HEADS} heads of {DIM}, {SLOTS} slots, chunk {CHUNK}, {TOKENS} tokens; {backend_used()}")


if __name__ == "__main__":
    main()
