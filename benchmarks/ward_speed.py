"""What Ward's rules cost on the compiled kernels: `python benchmarks/ward_speed.py --out ward_speed.json`.

Forward, forward and backward, and decoding beside the paper's rule, in interleaved calls, on keys and values
that are independent of each other, where no two tokens are near, and on noisy repeats of 600 pairs. Times are
those of the processor, on one thread, which other work on the machine disturbs less than the clock's.
`OVQ_CPU_KERNELS=avx2` measures the kernels of processors without AVX-512. Beside exact attention it is
`ovq bench --merge existing,ward-sqrt` that measures them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from ovq.ops import backend_used, cpu_kernels, ovq_attention
from ovq.runtime.environment import environment
from ovq.runtime.files import write_atomic

HEADS, DIM, SLOTS, CHUNK, DECODED = 8, 64, 1024, 256, 1024
PAPERS, LARGE = "paper's", "paper's, 4096 slots"
RULES = {
    PAPERS: {},
    LARGE: {"num_slots": 4096},
    "Ward": {"merge": "ward"},
    "Ward-sqrt": {"merge": "ward-sqrt"},
}
RATIOS = [(rule, other) for rule in ("Ward", "Ward-sqrt") for other in (PAPERS, LARGE)]

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
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3, help="calls of each rule, in turns")
    parser.add_argument("--out", type=Path, help="a JSON file of all times")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    console = Console(width=150)
    title = f"medians of {arguments.rounds}, ms"
    table = Table("inputs", "what", *RULES, *(f"{a} / {b}" for a, b in RATIOS), title=title)
    cases = [(make, run) for make in (independent, repeats) for run in (forward, backward, decode)]
    rows = []
    for make, run in track(cases, "rules", console=Console(stderr=True)):
        inputs = make(arguments.tokens)
        turns = [[seconds(run, inputs, rule) for rule in RULES.values()] for _ in range(arguments.rounds)]
        per = DECODED if run is decode else 1
        times = {
            rule: [1e3 * each / per for each in column]
            for rule, column in zip(RULES, zip(*turns, strict=True), strict=True)
        }
        medians = {rule: statistics.median(own) for rule, own in times.items()}
        about = {"inputs": make.__name__, "what": run.__name__, "length": arguments.tokens}
        rows += [
            about | {"rule": rule, "milliseconds": medians[rule], "all": own} for rule, own in times.items()
        ]
        ratios = (f"{medians[a] / medians[b]:.2f}" for a, b in RATIOS)
        table.add_row(make.__name__, run.__name__, *(f"{x:.3g}" for x in medians.values()), *ratios)
    console.print(table)
    sizes = f"{HEADS} heads of {DIM}, {SLOTS} slots, chunk {CHUNK}, {arguments.tokens} tokens"
    console.print(f"{sizes}; {backend_used()}, CPU kernels {cpu_kernels()}")
    if arguments.out is not None:
        where = environment("cpu") | {"cpu_kernels": cpu_kernels()}
        write_atomic(arguments.out, json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
