"""Comparison of runtimes for a pretrained model (`ovq bench --what converted`)."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ovq.convert.attach import memory_config_in
from ovq.runtime.progress import WorkReporter
from ovq_lab.bench import pretrained_peer
from ovq_lab.bench.measure import as_report

# Tokens generated after each length; the first is not counted.
NUM_WRITTEN = 17
# OpenVINO evicts blocks of this many tokens, and keeps at least four blocks.
BLOCK = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainedSuite:
    """Settings of a comparison of runtimes.

    Attributes:
        tokens: token ids of a text, at least as many as the largest length.
        dtypes: pairs of the model's dtype and the format of its weights (`weight_dtype` of
            `ovq.convert.attach`).
        gguf: the same model for llama.cpp; None to leave it out.
        llama_cpp: interpreter of an environment that has llama-cpp-python.
        openvino: folder of the same model for OpenVINO; None to leave it out.
        genai: interpreter of an environment that has openvino-genai.
    """

    model: Path
    tokens: Sequence[int]
    lengths: Sequence[int]
    dtypes: Sequence[tuple[str, str]] = (
        *(("float32", "float32"), ("float32", "int8")),
        *(("bfloat16", "int8"), ("bfloat16", "int4")),
    )
    gguf: Path | None = None
    llama_cpp: str = sys.executable
    openvino: Path | None = None
    genai: str = sys.executable

    def __post_init__(self) -> None:
        if max(self.lengths) > len(self.tokens):
            raise ValueError(
                f"--text: expected at least {max(self.lengths):,} tokens, found {len(self.tokens):,}"
            )

    def peers(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Name, interpreter and arguments of each runtime."""
        ours = {"kind": "ovq", "model": str(self.model)}
        for dtype, weight_dtype in self.dtypes:
            label = f"ovq, {dtype}" if weight_dtype == dtype else f"ovq, {dtype}, weights in {weight_dtype}"
            yield label, sys.executable, {"dtype": dtype, "weight_dtype": weight_dtype, **ours}
        if self.gguf is not None:
            arguments = {"kind": "llama_cpp", "model": str(self.gguf)}
            yield f"llama.cpp, {self.gguf.stem}, f16 cache", self.llama_cpp, arguments
        if self.openvino is not None:
            # As many rows as the converted model, and as many bytes (4 x rows: OpenVINO's numbers have one
            # byte, not four).
            memory = memory_config_in(self.model)
            assert memory is not None, "checked"
            rows = max(round(memory.rows_per_head) // BLOCK, 4) * BLOCK
            for num in (0, rows, 4 * rows):
                kept = f"{num:,} rows" if num else "full cache"
                theirs = {"kind": "openvino", "model": str(self.openvino), "rows": num}
                yield f"OpenVINO, {self.openvino.name}, {kept}", self.genai, theirs
        full = {"kind": "transformers", "model": str(self.model), "dtype": "float32"}
        yield "transformers, float32, full cache", sys.executable, full


def run_pretrained(suite: PretrainedSuite, reporter: WorkReporter) -> dict[str, Any]:
    """Measure each runtime in a process of its own, one after the other."""
    peers, lengths, rows, num_done = list(suite.peers()), sorted(suite.lengths), list[dict[str, Any]](), 0
    work = reporter.start("measuring", total=len(peers) * len(lengths))
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.json"
        tokens.write_text(json.dumps(list(suite.tokens[: max(lengths)])), encoding="utf-8")
        common = {"tokens": str(tokens), "lengths": lengths, "num_written": NUM_WRITTEN}
        common["threads"] = torch.get_num_threads()
        for label, python, arguments in peers:
            work.update(num_done, note=label)
            for found in _run(python, arguments | common):
                rows += _rows(label, arguments["kind"], found)
                num_done += 1
                work.update(num_done, note=f"{label}, {found['length']:,} tokens")
    return as_report(
        rows,
        suite={"dtypes": ["float32"], "lengths": lengths, "num_written": NUM_WRITTEN - 1},
        matrix_rate={},
    )


def _rows(label: str, kind: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Report rows, in the form of `ovq_lab.bench.show`, from a peer's output for one length."""
    same = {"label": label, "mixer": kind, "num_slots": None, "dtype": "float32", "length": found["length"]}
    same["version"] = found["version"]
    return [
        {"what": "converted_read", "seconds": found["read_seconds"], **same},
        {"what": "converted_write", "seconds": found["write_seconds"], **same},
        {"what": "converted_memory", "peak_bytes": found["peak_bytes"], "bytes": found["bytes"], **same},
    ]


def _run(python: str, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    command = [python, pretrained_peer.__file__, json.dumps(arguments)]
    with tempfile.TemporaryFile("w+") as errors:
        # Rows arrive one by one, minutes apart.
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            try:
                yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
            except BaseException:
                # Otherwise SIGTERM would take as long as its next row, and Ctrl-C could leave it at work.
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["nothing"])[-1]
            raise ValueError(
                f"{arguments['kind']}: expected {python} to run it, found exit code {process.returncode}, "
                f"{last}"
            )
