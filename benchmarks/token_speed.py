"""Time per token of `generate()`, from one model call to the next: `python benchmarks/token_speed.py`.

The model of `ovq bench --what model` with 28 million parameters decodes in two ways: all layers in one kernel
call, and module by module, as it does if there are hooks. transformers' Llama of equal size is the baseline.
They take turns. `--stretch 520` generates 520 tokens at a time, and shows the times of tokens that cannot run
in one call: the first after a prompt, and the first after each merged chunk. Beside other jobs, the processor
time of one thread is most reliable; on an idle machine, use `--threads 2 --wall`.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from transformers import LlamaForCausalLM

from ovq.hf import OVQForCausalLM
from ovq.hf.block import OVQBlock
from ovq.ops import cpu_kernels
from ovq_lab.bench.models import ModelWorkload

# Tokens per turn.
TURN = 16
# Name in tables -> the model, and its `OVQBlock.token_step`, which returns None to run by modules.
CONTENDERS = {
    "Llama": ("llama", OVQBlock.token_step),
    "modules": ("ovq", lambda *args: None),
    "one call": ("ovq", OVQBlock.token_step),
}


def note_calls(model: type, clock: Callable[[], float], times: list[float]) -> None:
    """Patch a model class to append the time of each call to `times`."""
    forward = model.forward  # type: ignore[attr-defined]  # of all models

    @functools.wraps(forward)
    def noted(*args: Any, **kwargs: Any) -> Any:
        times.append(clock())
        return forward(*args, **kwargs)

    model.forward = noted  # type: ignore[attr-defined]  # likewise


def print_stretch(generate: Callable[[], Any], times: list[float]) -> None:
    """Generate once; print times of tokens run by modules, and of tokens before them, which merge a chunk."""
    by_modules: set[int] = set()
    token_step = OVQBlock.token_step

    def noted(*args: Any) -> Any:
        step = token_step(*args)
        if step is None:
            by_modules.add(len(times) - 1)
        return step

    OVQBlock.token_step = noted  # type: ignore[method-assign]  # for a while
    times.clear()
    generate()
    OVQBlock.token_step = token_step  # type: ignore[method-assign]  # likewise
    found = [b - a for a, b in itertools.pairwise(times)]
    usual, total = statistics.median(found), sum(found)
    print(f"{len(found)} tokens: mean {1e3 * total / len(found):.2f}, median {1e3 * usual:.2f} ms")
    for name, where in (("by modules", by_modules), ("that merge", {i - 1 for i in by_modules})):
        own = [found[i] for i in sorted(where) if 0 <= i < len(found)]
        more = (sum(own) - len(own) * usual) / total
        each = ", ".join(f"{1e3 * x:.2f}" for x in own)
        print(f"  {len(own)} {name}: {each} ms; what is above the median is {more:.2%} of all")


def main(
    prompt: Annotated[int, typer.Option(min=2)] = 1024,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    turns: Annotated[int, typer.Option(min=1)] = 10,
    stretch: Annotated[int, typer.Option(min=0, help="Tokens to generate at a time; 0: the table.")] = 0,
    wall: Annotated[bool, typer.Option("--wall", help="Time by the clock, not of the processor.")] = False,
) -> None:
    """Print milliseconds per token: the first quartile, and the median."""
    times: list[float] = []
    for model in (LlamaForCausalLM, OVQForCausalLM):
        note_calls(model, time.perf_counter if wall else time.thread_time, times)
    workload = functools.partial(ModelWorkload, size="30M", length=prompt, num_threads=threads)
    if stretch:
        generate_stretch = workload(model="ovq").generation(stretch)
        for _ in range(turns):
            print_stretch(generate_stretch, times)
        return
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    generate = {name: workload(model=name).generation(TURN) for name in ("llama", "ovq")}
    for turn in range(turns + 1):
        for name, (model, token_step) in CONTENDERS.items():
            OVQBlock.token_step = token_step  # type: ignore[method-assign]  # for a while
            times.clear()
            generate[model]()
            # The first turn warms up.
            found[name] += [b - a for a, b in itertools.pairwise(times)] if turn else []
    print(f"{cpu_kernels()}; torch {torch.__version__}, {threads} threads, after {prompt:,} tokens")
    medians = {name: statistics.median(own) for name, own in found.items()}
    for name, own in found.items():
        quartile, rate = statistics.quantiles(own, n=4)[0], medians["Llama"] / medians[name]
        print(f"{name:9} {1e3 * quartile:7.2f} {1e3 * medians[name]:7.2f} ms, {rate:5.2f} times Llama's rate")


if __name__ == "__main__":
    typer.run(main)
