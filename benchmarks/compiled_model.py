"""Speedup of whole models by `torch.compile`: compiled and eager models in turns, in wall-clock time.

    python benchmarks/compiled_model.py
    python benchmarks/compiled_model.py --models ovq --size 2M --length 512

Models, sizes and tokens are those of `ovq bench --what model`. A training step is a forward and a backward.
For OVQ, a decode step after the prompt is measured too, with a cache that enters and leaves the graph. The
number of graphs counts compilations: one for each new shape or gradient mode.
"""

import statistics
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel

from ovq.hf.cache import CACHE_KEY
from ovq_lab.bench.measure import interleaved
from ovq_lab.bench.models import ModelWorkload
from ovq_lab.runtime.allocator import keep_freed_memory


def steps(
    model: PreTrainedModel, function: Callable, ids: torch.Tensor, options: dict
) -> Callable[[], object]:
    """Returns a training step: forward and backward by `function`, the model or its compiled version."""

    def step() -> None:
        function(ids, labels=ids, use_cache=False, **options).loss.backward()
        model.zero_grad()

    return step


def tokens(function: Callable, ids: torch.Tensor) -> Callable[[], object]:
    """Read the prompt; returns a decode step that continues by one token per call."""
    cache = getattr(function(ids, use_cache=True, logits_to_keep=1), CACHE_KEY)
    return lambda: function(ids[:, :1], **{CACHE_KEY: cache})


def medians(functions: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each function, measured in turns after two warm-up calls, which compile."""
    for function in functions * 2:
        function()
    return [statistics.median(times) for times in interleaved(functions, max_rounds=rounds, seconds=1e9)]


def main(
    models: str = "llama,ovq",
    size: str = "30M",
    length: int = 2048,
    rounds: int = 7,
    backend: Annotated[str, typer.Option(help="what makes code of a graph")] = "inductor",
) -> None:
    """Print how many times as fast the compiled model is."""
    keep_freed_memory()
    for name in models.split(","):
        workload = ModelWorkload(model=name, size=size, length=length, num_threads=torch.get_num_threads())
        model, ids, graphs = workload.build().train(), workload.tokens(), []

        def made(graph: torch.fx.GraphModule, example: list, graphs: list = graphs) -> Callable:
            graphs.append(graph)
            return torch._dynamo.lookup_backend(backend)(graph, example)

        compiled = torch.compile(model, backend=made, fullgraph=name != "llama")
        options = {} if name == "llama" else {"skip_logits": True}
        plain, fast = medians([steps(model, f, ids, options) for f in (model, compiled)], rounds)
        print(
            f"{workload.label}, a training step of {length:,} tokens: {plain:.3f} s, compiled {fast:.3f} s, "
            f"{plain / fast:.2f} times as fast; graphs: {len(graphs)}",
            flush=True,
        )
        if name == "llama":
            continue
        model.eval()
        with torch.no_grad():
            plain, fast = medians([tokens(f, ids) for f in (model, compiled)], 20 * rounds)
        print(
            f"{workload.label}, a token after {length:,}: {plain * 1e3:.2f} ms, "
            f"compiled {fast * 1e3:.2f} ms, {plain / fast:.2f} times as fast; graphs: {len(graphs)}",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)
