"""Measurements of whole models (`ovq bench --what model`), as JSON rows."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ovq.runtime.progress import WorkReporter
from ovq_lab.bench import check_chosen
from ovq_lab.bench.measure import (
    Piece,
    as_report,
    do_pieces,
    interleaved,
    matrix_rate,
    peak_bytes,
    spread,
)
from ovq_lab.bench.models import MODELS, SIZES, ModelWorkload

# Tokens per turn of `generate`, and turns: together as many tokens as a chunk has, to include a merge.
NEW_TOKENS, TURNS = 64, 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSuite:
    """Settings of a measurement of whole models.

    Attributes:
        models: names in `MODELS`; the first is the baseline of the others.
        lengths: tokens of a training step.
        prompts: tokens before generation.
    """

    models: Sequence[str]
    sizes: Sequence[str]
    lengths: Sequence[int]
    prompts: Sequence[int]

    def __post_init__(self) -> None:
        check_chosen("--models", self.models, MODELS)
        check_chosen("--sizes", self.sizes, SIZES)
        for flag, lengths in (("--lengths", self.lengths), ("--prompts", self.prompts)):
            if min(lengths, default=2) < 2:
                raise ValueError(f"{flag}: expected at least 2 tokens, found {min(lengths)}")

    def workloads(self, size: str, length: int) -> list[ModelWorkload]:
        """All models of one size."""
        threads = torch.get_num_threads()
        return [
            ModelWorkload(model=model, size=size, length=length, num_threads=threads) for model in self.models
        ]


def run_models(suite: ModelSuite, reporter: WorkReporter) -> dict[str, Any]:
    """Run a suite; the report is as by `run_suite`, with `size` and `parameters` in its rows."""
    rate = matrix_rate("float32")
    pieces: list[Piece] = []
    for size in suite.sizes:
        for length in suite.lengths:
            workloads = suite.workloads(size, length)
            pieces.append((f"training {size} {length}", partial(_training_rows, workloads, rate)))
            pieces.append((f"memory {size} {length}", partial(_memory_rows, workloads)))
        for length in suite.prompts:
            workloads = suite.workloads(size, length)
            pieces.append((f"generate {size} {length}", partial(_generation_rows, workloads)))
    return as_report(
        do_pieces(pieces, reporter),
        suite=dataclasses.asdict(suite) | {"dtypes": ["float32"]},
        matrix_rate={"float32": rate},
    )


def _training_rows(workloads: list[ModelWorkload], rate: float) -> list[dict]:
    """Training steps of all models, which take turns."""
    rows = []
    for row in _rows(
        "model_training",
        workloads,
        interleaved([w.training() for w in workloads], max_rounds=5, seconds=30),
    ):
        # Products with weights, forward and backward, without attention.
        flops = 6 * row["parameters"] * row["length"]
        per_second = {"tokens_per_second": row["length"] / row["seconds"]}
        rows.append(row | per_second | {"roofline_share": flops / row["seconds"] / rate})
    return rows


def _memory_rows(workloads: list[ModelWorkload]) -> list[dict]:
    """Peak bytes of two training steps, each model in a process of its own."""
    return [w.row("model_memory") | peak_bytes("model", w) for w in workloads]


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
    return [
        row | {"seconds_mean": sum(times) / len(times), "tokens_per_second": 1 / row["seconds"]}
        for row, times in zip(_rows("model_generate", workloads, all_times), all_times, strict=True)
    ]


def _rows(what: str, workloads: list[ModelWorkload], all_times: list[list[float]]) -> list[dict]:
    """Report rows from the times of the models; speedups are relative to the first."""
    rows = [w.row(what) | spread(times) for w, times in zip(workloads, all_times, strict=True)]
    return [row | {"speedup": rows[0]["seconds"] / row["seconds"]} for row in rows]
