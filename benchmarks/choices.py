"""Design choices of the `torch` backend, compared with their alternatives: `python benchmarks/choices.py`.

Times are medians of interleaved calls, relative to the choice that was made, at the reference shape (8 heads
of 64, chunk 256, 1024 slots). They are times of a single operation or, for choices of the plan, of a whole
prefill. `docs/results/speed.md` shows what this printed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ovq.layers import ShortConvolution, common
from ovq.ops import ovq_attention
from ovq.ops.backends.torch import streams
from ovq.research.bench.measure import interleaved
from ovq.research.bench.workloads import Workload

HEADS, CHUNK, SLOTS, DIM = 8, 256, 1024, 64
CPU_ELEMENTS, READ_BLOCK = streams.CPU_ELEMENTS, streams.READ_BLOCK

Choices = dict[str, Callable[[], object]]


def score_bias() -> Choices:
    """Add log counts and the causal mask to the scores."""
    q, keys = torch.randn(HEADS, CHUNK, DIM), torch.randn(HEADS, SLOTS, DIM)
    scores, bias = torch.empty(HEADS, CHUNK, SLOTS), torch.randn(HEADS, 1, SLOTS)

    def beta() -> None:
        scores.copy_(bias)
        scores.baddbmm_(q, keys.transpose(1, 2))

    def after() -> None:
        torch.bmm(q, keys.transpose(1, 2), out=scores)
        scores.add_(bias)

    return {"as the product's accumulator": beta, "added after the product": after}


def softmax() -> Choices:
    """Turn scores into probabilities."""
    scores = torch.randn(HEADS, CHUNK, SLOTS)
    out = torch.empty_like(scores)

    def by_hand() -> None:
        torch.exp(scores, out=out)
        out.div_(out.sum(-1, keepdim=True))

    return {
        "torch.softmax into a buffer": lambda: torch.softmax(scores, -1, out=out),
        "torch.softmax, new memory": lambda: torch.softmax(scores, -1),
        "exp and sum (no maximum)": by_hand,
    }


def best_slot() -> Choices:
    """Find the slot of the largest score, and the gap to the second."""
    scores = torch.randn(HEADS, CHUNK, SLOTS)

    def blocked() -> None:
        blocks = scores.view(HEADS, CHUNK, -1, 32)
        best = blocks.amax(-1)
        block = best.argmax(-1, keepdim=True)
        inside = blocks.gather(2, block[..., None].expand(-1, -1, 1, 32)).squeeze(2)
        place = inside.argmax(-1, keepdim=True)
        inside.scatter_(-1, place, -torch.inf)
        best.scatter_(-1, block, -torch.inf)
        torch.maximum(inside.amax(-1), best.amax(-1))

    return {
        "best block, then best in it, with gap": blocked,
        "argmax alone": lambda: scores.argmax(-1),
        "topk of 2": lambda: scores.topk(2, -1),
    }


def merge() -> Choices:
    """Add a chunk's keys to the sums of their slots."""
    keys = torch.randn(HEADS, CHUNK, DIM)
    sums, slots = torch.zeros(HEADS, SLOTS, DIM), torch.randint(SLOTS, (HEADS, CHUNK))
    flat = (slots + SLOTS * torch.arange(HEADS)[:, None]).flatten()

    def one_hot() -> None:
        torch.baddbmm(sums, torch.nn.functional.one_hot(slots, SLOTS).float().transpose(1, 2), keys)

    return {
        "index_add_": lambda: sums.view(-1, DIM).index_add_(0, flat, keys.view(-1, DIM)),
        "product with one-hot assignments": one_hot,
    }


def convolution() -> Choices:
    """The short convolution of a training step of a small model, forward and backward."""
    conv = ShortConvolution(384, conv_size=3)
    x, grad = torch.randn(16, 256, 384, requires_grad=True), torch.randn(16, 256, 384)

    def run(can_convolve: Callable[..., bool]) -> Callable[[], object]:
        def call() -> object:
            usual, common.can_convolve = common.can_convolve, can_convolve
            try:
                return torch.autograd.grad(conv(x)[0], [x, conv.weight], grad)
            finally:
                common.can_convolve = usual

        return call

    return {"compiled kernel": run(common.can_convolve), "products of PyTorch": run(lambda *_: False)}


def prefill(constant: str, values: tuple[int, ...], chosen: int) -> Choices:
    """A whole prefill of 16k tokens with another value of a constant of the plan."""
    inputs = Workload(mixer="ovq", length=16384, dtype="float32", num_slots=SLOTS).inputs()

    def run() -> object:
        with torch.no_grad():
            return ovq_attention(*inputs, num_slots=SLOTS, chunk_size=CHUNK, backend="torch")

    def with_value(value: int) -> Callable[[], object]:
        def call() -> object:
            setattr(streams, constant, value)
            try:
                return run()
            finally:
                setattr(streams, constant, chosen)

        return call

    return {f"{constant} = {value}": with_value(value) for value in (chosen, *values)}


def main() -> None:
    """Measure every choice and print the ratios."""
    experiments = [
        ("bias of the scores", score_bias()),
        ("softmax", softmax()),
        ("nearest slot", best_slot()),
        ("merge", merge()),
        ("short convolution, both ways", convolution()),
        ("heads worked on at once", prefill("CPU_ELEMENTS", (1 << 18, 1 << 20, 1 << 24), CPU_ELEMENTS)),
        ("queries read at once", prefill("READ_BLOCK", (64, 256), READ_BLOCK)),
    ]
    table = Table(
        title=f"Choices, the one made first; {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for column in ("what", "how", "median", "ratio"):
        table.add_column(column, justify="right" if column in ("median", "ratio") else "left")
    for what, choices in track(experiments, description="measuring", console=Console(stderr=True)):
        medians = [statistics.median(t) for t in interleaved(list(choices.values()), max_rounds=50)]
        for how, median in zip(choices, medians, strict=True):
            table.add_row(what, how, f"{median * 1e3:.2f} ms", f"{median / medians[0]:.2f}")
            what = ""
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
