"""Which measurements of whole models make a report (`ovq bench --what model`), as JSON rows."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ovq.ops import cpu_kernels
from ovq_lab.bench.measure import interleaved, matrix_rate, peak_bytes, spread
from ovq_lab.bench.models import MODELS, SIZES, ModelWorkload
from ovq_lab.runtime.environment import environment

# Tokens of a turn of `generate`, and turns: together as many tokens as a chunk has, to include a merge.
NEW_TOKENS, TURNS = 64, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSuite:
    """What to measure.

    Attributes:
        models: some of `MODELS`; the others are compared with the first.
        sizes: some of `SIZES`.
        lengths: tokens of a training step.
        prompts: tokens before generation.

    Example:
        >>> ModelSuite(models=("llama", "ovq"), sizes=("2M",), lengths=(64, 128), prompts=(32,)).total
        5
    """

    models: Sequence[str]
    sizes: Sequence[str]
    lengths: Sequence[int]
    prompts: Sequence[int]

    def __post_init__(self) -> None:
        for flag, found, allowed in (("--models", self.models, MODELS), ("--sizes", self.sizes, SIZES)):
            unknown = [name for name in found if name not in allowed]
            if unknown or not found:
                raise ValueError(
                    f"{flag}: expected some of {', '.join(allowed)}, found {', '.join(unknown) or 'none'}"
                )
        for flag, lengths in (("--lengths", self.lengths), ("--prompts", self.prompts)):
            if min(lengths, default=2) < 2:
                raise ValueError(f"{flag}: expected at least 2 tokens, found {min(lengths)}")

    @property
    def total(self) -> int:
        """Number of pieces of work, for a progress bar."""
        return len(self.sizes) * (2 * len(self.lengths) + len(self.prompts))

    def workloads(self, size: str, length: int) -> list[ModelWorkload]:
        """All models of one size."""
        threads = torch.get_num_threads()
        return [
            ModelWorkload(model=model, size=size, length=length, num_threads=threads) for model in self.models
        ]


def run_models(suite: ModelSuite, progress: Callable[[int, str], None]) -> dict:
    """Measure everything.

    Args:
        suite: what to measure.
        progress: called with the number of finished pieces and a note.

    Returns:
        A report in the form of `ovq_lab.bench.suite.run_suite`. Rows also have `size` and `parameters`.
    """
    rate = matrix_rate("float32")
    rows: list[dict] = []
    done = 0

    def note(text: str) -> None:
        nonlocal done
        progress(done, text)
        done += 1

    for size in suite.sizes:
        for length in suite.lengths:
            note(f"training {size} {length}")
            rows += _training_rows(suite.workloads(size, length), rate)
            note(f"memory {size} {length}")
            rows += [
                _row("model_memory", w) | peak_bytes({"what": "model", "workload": dataclasses.asdict(w)})
                for w in suite.workloads(size, length)
            ]
        for length in suite.prompts:
            note(f"generate {size} {length}")
            rows += _generation_rows(suite.workloads(size, length))
    progress(done, "done")
    return {
        "environment": environment("cpu") | {"backends": {}, "cpu_kernels": cpu_kernels()},
        "suite": dataclasses.asdict(suite) | {"dtypes": ["float32"]},
        "matrix_rate": {"float32": rate},
        "rows": rows,
        "crossover": [],
    }


def _row(what: str, workload: ModelWorkload) -> dict:
    return {
        "what": what,
        "mixer": workload.model,
        "label": workload.label,
        "num_slots": None,
        "length": workload.length,
        "dtype": "float32",
        "size": workload.size,
        "parameters": workload.num_parameters(),
    }


def _training_rows(workloads: list[ModelWorkload], rate: float) -> list[dict]:
    """Training steps of all models, which take turns."""
    all_times = interleaved([w.training() for w in workloads], max_rounds=5, seconds=30)
    first = spread(all_times[0])["seconds"]
    rows = []
    for workload, times in zip(workloads, all_times, strict=True):
        row = _row("model_training", workload) | spread(times)
        # The products with weights, forward and backward; attention is not counted.
        flops = 6 * row["parameters"] * workload.length
        rows.append(
            row
            | {
                "speedup": first / row["seconds"],
                "tokens_per_second": workload.length / row["seconds"],
                "roofline_share": flops / row["seconds"] / rate,
            }
        )
    return rows


def _generation_rows(workloads: list[ModelWorkload]) -> list[dict]:
    """Seconds per token of `generate` after a prompt; models take turns of `NEW_TOKENS` tokens."""
    functions = [w.generation(NEW_TOKENS) for w in workloads]
    for function in functions:
        function()
    all_times: list[list[float]] = [[] for _ in functions]
    for _ in range(TURNS):
        for times, function in zip(all_times, functions, strict=True):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) / NEW_TOKENS)
    first = statistics.median(all_times[0])
    return [
        _row("model_generate", workload)
        | spread(times)
        | {
            "speedup": first / statistics.median(times),
            "seconds_mean": sum(times) / len(times),
            "tokens_per_second": 1 / statistics.median(times),
        }
        for workload, times in zip(workloads, all_times, strict=True)
    ]
