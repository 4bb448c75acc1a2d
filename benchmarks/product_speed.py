"""Products of tokens with weights, by processor time: `python benchmarks/product_speed.py`.

The kernel of `linear.h`, PyTorch's library and oneDNN take turns on one thread at the sizes of a model of 28
million parameters: the forward (y), the gradient of the input (dx) and of the weight (dW).
`OVQ_CPU_KERNELS=avx2` measures the kernel of another level. The kernel runs here on every processor, so that
this tells where else than on AMD's `has_faster_products` should send products to it.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer
from torch import Tensor

from ovq.ops import cpu_kernels
from ovq.ops.backends.cpu import linear

# Width of the input and of the output.
SIZES = ((512, 1536), (512, 512), (512, 2816), (1408, 512), (512, 4096))


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """`a b` as oneDNN's linear layer."""
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


CONTENDERS = {"kernel": linear.product, "PyTorch": torch.mm, "oneDNN": onednn}


def rates(num_tokens: int, rounds: int, which: str) -> dict[str, tuple[float, float]]:
    """GFLOP/s of all sizes together, and the root mean square error relative to the largest number."""
    seconds, errors = dict.fromkeys(CONTENDERS, 0.0), dict.fromkeys(CONTENDERS, 0.0)
    operations = 0
    for width, num_out in SIZES:
        x, weight, grad = (
            torch.randn(n, m) for n, m in ((num_tokens, width), (num_out, width), (num_tokens, num_out))
        )
        a, b = {"y": (x, weight.t()), "dx": (grad, weight), "dW": (grad.t(), x)}[which]
        exact = a.double() @ b.double()
        operations += 2 * num_tokens * width * num_out
        times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for name, function in CONTENDERS.items():
            error = (function(a, b) - exact).square().mean().sqrt() / exact.abs().max()
            errors[name] = max(errors[name], float(error))
        for _ in range(rounds):
            for name, function in CONTENDERS.items():
                start = time.process_time()
                function(a, b)
                times[name].append(time.process_time() - start)
        for name, own in times.items():
            seconds[name] += statistics.median(own)
    return {name: (operations / seconds[name] / 1e9, errors[name]) for name in CONTENDERS}


def main(
    tokens: Annotated[int, typer.Option(min=1)] = 2048, rounds: Annotated[int, typer.Option(min=1)] = 7
) -> None:
    """Print a table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    linear.has_faster_products = lambda: True
    print(f"{tokens} tokens, CPU kernels {cpu_kernels()}; GFLOP/s and relative error")
    for which in ("y", "dx", "dW"):
        found = rates(tokens, rounds, which).items()
        print(
            f"{which:3}" + "".join(f"   {name} {rate:6.1f} {error:.1e}" for name, (rate, error) in found),
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
