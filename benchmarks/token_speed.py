"""Time per token of `generate()`, from one model call to the next: `python benchmarks/token_speed.py`.

The model of `ovq bench --what model` with 28 million parameters decodes in two ways: all layers in one kernel
call, and module by module, as it does if there are hooks. transformers' Llama of equal size is the baseline.
They take turns. Beside other jobs, the processor time of one thread is most reliable; on an idle machine, use
`--threads 2 --wall`.
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


def main(
    prompt: Annotated[int, typer.Option(min=2)] = 1024,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    turns: Annotated[int, typer.Option(min=1)] = 10,
    wall: Annotated[bool, typer.Option("--wall", help="Time by the clock, not of the processor.")] = False,
) -> None:
    """Print milliseconds per token: the first quartile, and the median."""
    times: list[float] = []
    for model in (LlamaForCausalLM, OVQForCausalLM):
        note_calls(model, time.perf_counter if wall else time.thread_time, times)
    found: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    sizes: dict[str, Any] = {"size": "30M", "length": prompt, "num_threads": threads}
    generate = {name: ModelWorkload(model=name, **sizes).generation(TURN) for name in ("llama", "ovq")}
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
